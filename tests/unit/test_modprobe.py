"""Loading the driver, with a script in the place of modprobe."""

from __future__ import annotations

import pytest

from rbdnbd.devices import NbdDevices
from rbdnbd.errors import RbdnbdError
from rbdnbd.modprobe import load_driver


@pytest.fixture
def devices(tmp_path):
    return NbdDevices(sys=tmp_path / "sys", proc=tmp_path / "proc")


@pytest.fixture
def modprobe(tmp_path):
    """Make a modprobe of a shell script's lines, and have the kernel name it."""

    def make(script: str) -> None:
        program = tmp_path / "modprobe"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        setting = tmp_path / "proc/sys/kernel/modprobe"
        setting.parent.mkdir(parents=True)
        setting.write_text(f"{program}\n")

    return make


@pytest.mark.parametrize(
    ("given", "parameters"),
    [
        ({}, "max_part=255"),
        ({"nbds_max": 4}, "nbds_max=4 max_part=255"),
        ({"nbds_max": 4, "max_part": 0}, "nbds_max=4 max_part=0"),
    ],
)
def test_a_missing_driver_is_loaded_with_its_parameters(devices, modprobe, given, parameters):
    modprobe(f'[ "$*" = "nbd {parameters}" ] && mkdir -p {devices.sys}/module/nbd')
    assert load_driver(devices, **given)
    assert devices.driver_present()


def test_a_driver_that_is_there_is_left_alone(devices, modprobe):
    (devices.sys / "module/nbd").mkdir(parents=True)
    modprobe(f"touch {devices.sys}/called")
    assert not load_driver(devices, nbds_max=4)
    assert not (devices.sys / "called").exists()


def test_modprobes_own_words_say_why_it_failed(devices, modprobe):
    modprobe("echo 'FATAL: Module nbd not found in directory /lib/modules/6.1' >&2; exit 1")
    with pytest.raises(RbdnbdError) as refused:
        load_driver(devices)
    assert refused.value.message == (
        "the kernel has no nbd driver: modprobe nbd failed: "
        "FATAL: Module nbd not found in directory /lib/modules/6.1"
    )


def test_a_modprobe_without_words_is_quoted_by_its_status(devices, modprobe):
    modprobe("exit 3")
    with pytest.raises(RbdnbdError) as refused:
        load_driver(devices)
    assert refused.value.message == (
        "the kernel has no nbd driver: modprobe nbd failed: exit status 3"
    )


def test_a_machine_without_modprobe_says_so(devices):
    with pytest.raises(RbdnbdError) as refused:
        load_driver(devices)
    assert refused.value.message == (
        "the kernel has no nbd driver: modprobe nbd failed: "
        f"{devices.proc}/sys/kernel/modprobe: No such file or directory"
    )
