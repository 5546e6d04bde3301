"""The address of exactly one client, which alone may be blocklisted."""

from __future__ import annotations

import pytest

from rbdnbd.cluster import client_address
from rbdnbd.errors import RbdnbdError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("198.18.1.1:0/3426820081", "198.18.1.1:0/3426820081"),
        ("[2001:db8::1]:0/7", "[2001:db8::1]:0/7"),
        ("v2:198.18.1.1:0/3426820081", "198.18.1.1:0/3426820081"),
    ],
)
def test_the_address_of_a_client_is_as_blocklists_have_it(text: str, address: str) -> None:
    assert client_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "198.18.1.1", "198.18.1.1:0/0", "198.18.1.0/24", "198.18.1.1:0/7 ", "a b:0/7"]
)
def test_what_stands_for_more_than_one_client_or_none_is_refused(text: str) -> None:
    with pytest.raises(RbdnbdError) as refused:
        client_address(text)
    assert refused.value.message == f"{text!r} is not the address of one Ceph client"
