"""Which words are Ceph's options, as librados itself has it."""

from __future__ import annotations

import pytest

from rbdnbd.errors import RbdnbdError
from rbdnbd.settings import take_settings


@pytest.mark.parametrize(
    ("words", "settings", "rest"),
    [
        ("--rbd-op-threads 7 map x", [("rbd_op_threads", "7")], "map x"),
        ("map --debug_rbd=20 x", [("debug_rbd", "20")], "map x"),
        ("--debug-rbd 1/5 map", [("debug_rbd", "1/5")], "map"),
        ("--rbd-cache x", [("rbd_cache", "true")], "x"),
        ("--rbd_cache false x", [("rbd_cache", "false")], "x"),
        ("--rbd-cache=false x", [("rbd_cache", "false")], "x"),
        ("--rbd-cache 0", [("rbd_cache", "0")], ""),
        ("--no-rbd-cache x", [("rbd_cache", "false")], "x"),
        ("--rbd-default-pool p", [("rbd_default_pool", "p")], ""),
        ("--setuser ceph --setgroup ceph", [("setuser", "ceph"), ("setgroup", "ceph")], ""),
        ("--key a= --host h", [("key", "a="), ("host", "h")], ""),
        ("--debug-foo 1", [], "--debug-foo 1"),
        ("map host", [], "map host"),
        ("--no-foo --no-debug-rbd -x --force", [], "--no-foo --no-debug-rbd -x --force"),
    ],
)
def test_librados_tells_which_words_are_settings(words, settings, rest):
    assert take_settings(words.split()) == (tuple(settings), rest.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--rbd-op-threads foo", "parse error setting 'rbd_op_threads' to 'foo'"),
        ("--debug-rbd=x", "parse error setting 'debug_rbd' to 'x'"),
        ("--rbd-cache=maybe", "parse error setting 'rbd_cache' to 'maybe'"),
        ("--debug-rbd", "Option --debug-rbd requires an argument."),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(words, sentence, capfd):
    with pytest.raises(RbdnbdError) as refused:
        take_settings(words.split())
    assert refused.value.message == sentence
    assert capfd.readouterr() == ("", "")
