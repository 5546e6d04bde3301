"""How an image is named, and what of Ceph's configuration the command line sets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbdnbd.errors import UsageError
from rbdnbd.spec import ClusterOptions, ImageSpec

SPECS = {
    "vol": ("", "", "vol", ""),
    "rbd/vol": ("rbd", "", "vol", ""),
    "rbd/ns/vol": ("rbd", "ns", "vol", ""),
    "vol@yesterday": ("", "", "vol", "yesterday"),
    "rbd/vol@yesterday": ("rbd", "", "vol", "yesterday"),
    "rbd/ns/vol@yesterday": ("rbd", "ns", "vol", "yesterday"),
    "my pool/my image@my snap": ("my pool", "", "my image", "my snap"),
    " / ": (" ", "", " ", ""),
    "rbd/-v": ("rbd", "", "-v", ""),
    "rbd/ns/Größe:1.0+x,y=z": ("rbd", "ns", "Größe:1.0+x,y=z", ""),
}

NO_SPECS = [
    "",
    "/",
    "@",
    "/vol",
    "rbd/",
    "rbd//vol",
    "rbd/ns/",
    "rbd/ns/more/vol",
    "/dev/nbd0",
    "@yesterday",
    "rbd/@yesterday",
    "vol@",
    "vol@a@b",
    "vol@a/b",
    "rbd@a/vol",
]

PRINTABLE = st.characters(exclude_characters="/@", exclude_categories=["C", "Z"]) | st.just(" ")
NAMES = st.text(PRINTABLE, min_size=1)


@pytest.mark.parametrize(("text", "parts"), SPECS.items())
def test_a_spec_has_pool_namespace_image_and_snapshot(text, parts):
    assert ImageSpec.parse(text) == ImageSpec(*parts)


@pytest.mark.parametrize("text", SPECS)
def test_a_spec_is_said_as_it_was_written(text):
    assert str(ImageSpec.parse(text)) == text


@pytest.mark.parametrize("text", NO_SPECS)
def test_anything_else_is_refused_with_what_was_expected(text):
    with pytest.raises(UsageError) as refused:
        ImageSpec.parse(text)
    assert refused.value.message == (
        f"invalid spec {text!r}: expected [pool/[namespace/]]image[@snap]"
    )


@given(pool=NAMES, namespace=st.just("") | NAMES, image=NAMES, snap=st.just("") | NAMES)
def test_every_spec_with_a_pool_is_read_as_it_is_said(pool, namespace, image, snap):
    spec = ImageSpec(pool, namespace, image, snap)
    assert ImageSpec.parse(str(spec)) == spec


@given(image=NAMES, snap=st.just("") | NAMES)
def test_every_spec_without_a_pool_is_read_as_it_is_said(image, snap):
    spec = ImageSpec("", "", image, snap)
    assert ImageSpec.parse(str(spec)) == spec


def test_a_pool_is_put_in_where_it_was_left_out():
    assert ImageSpec.parse("vol@yesterday").in_pool("rbd") == ImageSpec.parse("rbd/vol@yesterday")


def test_a_pool_that_was_named_stays():
    assert ImageSpec.parse("ssd/ns/vol").in_pool("rbd") == ImageSpec.parse("ssd/ns/vol")


def test_the_command_line_overrides_only_what_it_names():
    given = ClusterOptions(name="client.joe", keyring="/k", mon_host="192.0.2.1").overrides()
    assert given.keys() - {"err_to_stderr", "log_to_stderr"} == {"keyring", "mon_host"}
    assert (given["keyring"], given["mon_host"]) == ("/k", "192.0.2.1")


def test_librados_is_kept_off_stderr():
    overrides = ClusterOptions().overrides()
    assert overrides == {"err_to_stderr": "false", "log_to_stderr": "false"}
