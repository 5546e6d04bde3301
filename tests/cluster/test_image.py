"""RbdImage on a real cluster: the contract, what librbd adds to it, and what can be missing."""

from __future__ import annotations

import ast
import errno
import importlib
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rbdnbd.cluster import default_pool
from rbdnbd.image import RbdImage
from rbdnbd.spec import ClusterOptions, ImageSpec
from tests.support.contract import SIZE, ImageContract
from tests.support.opening import opened, refusal

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("each_handle")

Rbd = Callable[..., str]
MakeImage = Callable[..., str]


class TestRbdImage(ImageContract):
    @pytest.fixture
    def image(self, image: MakeImage, options: ClusterOptions) -> Iterator[RbdImage]:
        with opened(image(f"{SIZE}B"), options) as opened_image:
            yield opened_image


@pytest.mark.parametrize("length", [(1 << 31) - 1, 1 << 31, 4294966784])
def test_trims_and_zeroes_of_nearly_4_gib_are_done_whole(
    length: int, image: MakeImage, options: ClusterOptions
) -> None:
    with opened(image("5G"), options) as opened_image:
        last = length - 4096
        for erase in (
            lambda: opened_image.write_zeroes(0, length, no_hole=False),
            lambda: opened_image.discard(0, length - length % 65536),
        ):
            opened_image.write(0, b"first")
            opened_image.write(last - last % 65536 - 65536, b"last")
            erase()
            assert opened_image.read(0, 5) == bytes(5)
            assert opened_image.read(last - last % 65536 - 65536, 4) == bytes(4)


def test_zeroes_without_a_hole_keep_their_space(
    image: MakeImage, options: ClusterOptions, rbd: Rbd
) -> None:
    spec = image("16M")
    with opened(spec, options) as opened_image:
        opened_image.write_zeroes(0, 8 << 20, no_hole=True)
        opened_image.flush()
    assert json.loads(rbd("du", "--format", "json", spec))["images"][0]["used_size"] == 8 << 20


def test_the_size_follows_a_resize_by_another_client(
    image: MakeImage, options: ClusterOptions, rbd: Rbd
) -> None:
    spec = image("16M")
    with opened(spec, options) as opened_image:
        rbd("resize", "--no-progress", "--size", "32M", spec)
        assert opened_image.size() == 32 << 20


def test_closing_flushes_and_leaves_neither_lock_nor_watcher(
    image: MakeImage, options: ClusterOptions, rbd: Rbd, tmp_path: Path
) -> None:
    spec = image("16M")
    with opened(spec, options) as opened_image:
        opened_image.write(0, b"x" * 4096)
        assert json.loads(rbd("status", "--format", "json", spec))["watchers"]
    assert json.loads(rbd("status", "--format", "json", spec))["watchers"] == []
    assert json.loads(rbd("lock", "ls", "--format", "json", spec)) == []
    rbd("export", "--no-progress", spec, str(tmp_path / "export"))
    assert (tmp_path / "export").read_bytes()[:4096] == b"x" * 4096


def test_a_snapshot_is_opened_read_only_as_it_was(
    image: MakeImage, options: ClusterOptions, rbd: Rbd
) -> None:
    spec = image("16M")
    with opened(spec, options) as opened_image:
        opened_image.write(0, b"before")
    rbd("snap", "create", "--no-progress", f"{spec}@s")
    with opened(spec, options) as opened_image:
        opened_image.write(0, b"after!")
    with opened(f"{spec}@s", options) as snapshot:
        assert snapshot.read_only
        assert snapshot.read(0, 6) == b"before"


def test_a_snapshot_is_opened_by_its_id_read_only_as_it_was(
    image: MakeImage, options: ClusterOptions, rbd: Rbd
) -> None:
    spec = image("16M")
    with opened(spec, options) as opened_image:
        opened_image.write(0, b"before")
        opened_image.flush()
        rbd("snap", "create", "--no-progress", f"{spec}@s")
        opened_image.write(0, b"after!")
    snap_id = json.loads(rbd("snap", "ls", "--format", "json", spec))[0]["id"]
    by_id = replace(ImageSpec.parse(spec), snap_id=snap_id)
    with opened(by_id, options) as snapshot:
        assert snapshot.read_only
        assert snapshot.spec == by_id
        assert snapshot.read(0, 6) == b"before"
        with pytest.raises(OSError) as raised:
            snapshot.write(0, b"x")
        assert raised.value.errno == errno.EROFS


def test_a_snapshot_is_named_by_its_name_or_its_id_but_not_by_both(
    options: ClusterOptions,
) -> None:
    both = ImageSpec("rbd", "", "volume", snap="s", snap_id=4)
    assert refusal(both, options) == "use either snapname or snapid, not both"


def test_an_image_is_known_by_its_id_and_its_client_as_the_cluster_knows_them(
    image: MakeImage, options: ClusterOptions, rbd: Rbd
) -> None:
    spec = image("16M")
    with opened(spec, options) as opened_image:
        assert opened_image.image_id == json.loads(rbd("info", "--format", "json", spec))["id"]
        (watcher,) = json.loads(rbd("status", "--format", "json", spec))["watchers"]
        assert opened_image.address == watcher["address"]


def test_a_write_to_a_read_only_image_is_erofs(image: MakeImage, options: ClusterOptions) -> None:
    with opened(image("16M"), options, read_only=True) as opened_image:
        with pytest.raises(OSError) as raised:
            opened_image.write(0, b"x")
        assert raised.value.errno == errno.EROFS


def test_an_image_in_a_namespace_is_found(
    image: MakeImage, options: ClusterOptions, rbd: Rbd
) -> None:
    rbd("namespace", "create", "rbd/tenant")
    rbd("create", "--size", "8M", "rbd/tenant/volume")
    try:
        with opened("rbd/tenant/volume", options) as opened_image:
            assert opened_image.size() == 8 << 20
    finally:
        rbd("rm", "--no-progress", "rbd/tenant/volume")
        rbd("namespace", "rm", "rbd/tenant")


def test_a_spec_without_a_pool_is_in_the_default_pool(
    image: MakeImage, options: ClusterOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = image("8M")
    with opened(spec.removeprefix("rbd/"), options) as opened_image:
        assert str(opened_image.spec) == spec
    monkeypatch.setenv("CEPH_ARGS", "--rbd-default-pool other")
    assert default_pool(options) == "other"


def test_what_does_not_exist_is_named(image: MakeImage, options: ClusterOptions) -> None:
    spec = image("8M")
    assert refusal("nope/volume", options) == "pool nope does not exist"
    assert refusal("rbd/nope", options) == "image rbd/nope does not exist"
    assert refusal("rbd/nope@snap", options) == "image rbd/nope does not exist"
    assert refusal(f"{spec}@nope", options) == f"image {spec} has no snapshot nope"
    by_id = replace(ImageSpec.parse(spec), snap_id=77)
    assert refusal(by_id, options) == f"image {spec} has no snapshot with the id 77"
    assert refusal("rbd/nope/volume", options) == "namespace nope does not exist in pool rbd"
    assert refusal(spec, ClusterOptions(conf="/nope")) == "cannot read /nope: it does not exist"


def test_a_client_without_a_key_is_told_where_it_was_looked_for(
    options: ClusterOptions, tmp_path: Path
) -> None:
    keyring = tmp_path / "keyring"
    stranger = replace(options, name="client.stranger", keyring=str(keyring))
    assert refusal("rbd/x", stranger) == f"no key for client.stranger can be read from {keyring}"


def test_a_client_that_the_cluster_does_not_know_is_refused(
    options: ClusterOptions, tmp_path: Path
) -> None:
    keyring = tmp_path / "keyring"
    argv = ["ceph-authtool", "--create-keyring", str(keyring), "--gen-key", "-n", "client.stranger"]
    subprocess.run(argv, check=True, capture_output=True)
    stranger = replace(options, name="client.stranger", keyring=str(keyring))
    assert refusal("rbd/x", stranger) == (
        "the cluster refused client.stranger: it does not exist there or its key is wrong"
    )


def test_a_client_that_may_only_read_is_told_so(
    image: MakeImage, options: ClusterOptions, tmp_path: Path
) -> None:
    spec, keyring = image("8M"), tmp_path / "keyring"
    caps = ["mon", "profile rbd", "osd", "profile rbd-read-only"]
    conf = ["--conf", options.conf]
    subprocess.run(
        ["ceph", *conf, "auth", "get-or-create", "client.reader", *caps, "-o", str(keyring)],
        check=True,
        capture_output=True,
    )
    reader = replace(options, name="client.reader", keyring=str(keyring))
    assert refusal(spec, reader) == (
        f"client.reader may not write {spec}: its capabilities do not allow it "
        "(--read-only needs less)"
    )
    with opened(spec, reader, read_only=True) as opened_image:
        assert opened_image.read(0, 1) == b"\0"


def test_a_monitor_that_does_not_answer_is_given_up_on(
    options: ClusterOptions, tmp_path: Path
) -> None:
    conf = tmp_path / "ceph.conf"
    conf.write_text(Path(options.conf).read_text() + "\n[client]\nclient_mount_timeout = 2\n")
    nobody = replace(options, conf=str(conf), mon_host="v2:127.0.0.1:1")
    assert refusal("rbd/x", nobody) == (
        "no monitor answered within 2 s (mon_host = v2:127.0.0.1:1)"
    )


def test_without_any_configuration_that_is_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CEPH_CONF", raising=False)
    assert refusal("rbd/x", ClusterOptions(cluster="nosuchcluster")) == (
        "no monitor is known: there is no ceph.conf with mon_host and none was given (-m)"
    )


@pytest.mark.parametrize("module", ["rados", "rbd"])
def test_the_stubs_name_nothing_that_the_bindings_lack(module: str) -> None:
    real = importlib.import_module(module)
    text = (ROOT / f"stubs/{module}.pyi").read_text()
    later = {number for number, line in enumerate(text.splitlines(), 1) if "# since" in line}
    public = [node for node in ast.parse(text).body if not _name(node).startswith("_")]
    for node in public:
        if isinstance(node, ast.AnnAssign) and node.lineno not in later:
            assert hasattr(real, _name(node)), _name(node)
        if isinstance(node, ast.ClassDef):
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            names = [each.name for each in methods if each.lineno not in later]
            missing = [name for name in names if not hasattr(getattr(real, node.name), name)]
            assert not missing, f"{module}.{node.name} has no {missing}"


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    return getattr(node, "name", "")
