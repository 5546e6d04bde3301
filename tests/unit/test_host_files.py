"""What is installed for udev and systemd, and that nothing of it is left behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "contrib/install-host-files.sh"
FILES = {
    "usr/local/lib/udev/rules.d/59-rbdnbd.rules",
    "usr/local/lib/systemd/system/rbdnbd@.service",
    "usr/local/lib/rbdnbd/bin/rbdnbd-systemd-stop",
}


def run(action: str, root: Path, prefix: str = "/usr/local") -> str:
    environment = os.environ | {"DESTDIR": str(root)}
    argv = [SCRIPT, action, prefix]
    return subprocess.run(
        argv, env=environment, capture_output=True, text=True, check=True, timeout=30
    ).stdout


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_what_is_installed_calls_the_command_below_the_prefix(tmp_path: Path) -> None:
    assert run("install", tmp_path) == ""
    assert files(tmp_path) == FILES
    for file in FILES:
        text = (tmp_path / file).read_text()
        assert "/usr/local/bin/rbdnbd" in text
        assert "@PREFIX@" not in text
    stop = tmp_path / "usr/local/lib/rbdnbd/bin/rbdnbd-systemd-stop"
    assert os.access(stop, os.X_OK)
    assert f"ExecStop=/{stop.relative_to(tmp_path)} " in (
        tmp_path / "usr/local/lib/systemd/system/rbdnbd@.service"
    ).read_text(encoding="utf-8")


def test_uninstalling_leaves_nothing(tmp_path: Path) -> None:
    run("install", tmp_path)
    run("uninstall", tmp_path)
    assert files(tmp_path) == set()


def test_uninstalling_what_is_not_there_is_no_failure(tmp_path: Path) -> None:
    assert run("uninstall", tmp_path) == ""


def test_below_another_prefix_it_is_said_what_to_link(tmp_path: Path) -> None:
    argv = [SCRIPT, "install", tmp_path / "opt"]
    environment = {key: value for key, value in os.environ.items() if key != "DESTDIR"}
    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, check=True, timeout=30
    )
    rule = tmp_path / "opt/lib/udev/rules.d/59-rbdnbd.rules"
    assert f"link {rule} into /etc/udev/rules.d" in done.stdout
