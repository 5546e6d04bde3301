"""The three formats of list-mapped, against bytes that rbd-nbd 16.2.15 printed."""

from __future__ import annotations

import pytest

from rbdnbd.listing import listing


def document(number: int, **fields) -> dict:
    whole = {"id": 13041 + number, "pool": "rbd", "namespace": "", "image": "img1", "snap": ""}
    whole |= {"device": f"/dev/nbd{number}", "cookie": "1111", "size": 1 << 20, "stats": {}}
    return whole | fields


PAIR = [document(0), document(1, pool="p", namespace="ns", image="i", snap="s", cookie="C d")]


@pytest.mark.parametrize("pretty", [False, True])
def test_nothing_at_all_is_printed_when_nothing_is_mapped(pretty):
    assert listing([], "plain", pretty=pretty) == ""


@pytest.mark.parametrize(
    ("style", "pretty", "printed"),
    [
        ("json", False, "[]"),
        ("json", True, "[]\n"),
        ("xml", False, "<devices></devices>"),
        ("xml", True, "<devices>\n</devices>\n\n"),
    ],
)
def test_an_empty_list_is_a_document_of_its_own(style, pretty, printed):
    assert listing([], style, pretty=pretty) == printed


@pytest.mark.parametrize("pretty", [False, True])
def test_plain_columns_are_as_wide_as_their_longest_cell_the_last_one_too(pretty):
    assert listing(PAIR, "plain", pretty=pretty) == (
        "id     pool  namespace  image  snap  device     cookie\n"
        "13041  rbd              img1   -     /dev/nbd0  1111  \n"
        "13042  p     ns         i      s     /dev/nbd1  C d   \n"
    )


def test_plain_widths_count_bytes():
    printed = listing([document(0, image="éé"), document(1, image="abcde")], "plain", pretty=False)
    assert printed.splitlines()[1].startswith("13041  rbd              éé   -  ")


def test_json_is_one_line_without_a_newline():
    assert listing(PAIR[:1], "json", pretty=False) == (
        '[{"id":13041,"pool":"rbd","namespace":"","image":"img1","snap":"",'
        '"device":"/dev/nbd0","cookie":"1111"}]'
    )


def test_pretty_json_is_indented_by_four():
    assert listing(PAIR, "json", pretty=True) == (
        '[\n    {\n        "id": 13041,\n        "pool": "rbd",\n        "namespace": "",\n'
        '        "image": "img1",\n        "snap": "",\n        "device": "/dev/nbd0",\n'
        '        "cookie": "1111"\n    },\n    {\n        "id": 13042,\n        "pool": "p",\n'
        '        "namespace": "ns",\n        "image": "i",\n        "snap": "s",\n'
        '        "device": "/dev/nbd1",\n        "cookie": "C d"\n    }\n]\n'
    )


def test_xml_is_one_line_without_a_newline():
    assert listing(PAIR[:1], "xml", pretty=False) == (
        "<devices><device><id>13041</id><pool>rbd</pool><namespace></namespace>"
        "<image>img1</image><snap></snap><device>/dev/nbd0</device>"
        "<cookie>1111</cookie></device></devices>"
    )


def test_pretty_xml_is_indented_by_one_and_ends_with_an_empty_line():
    assert listing(PAIR[:1], "xml", pretty=True) == (
        "<devices>\n <device>\n  <id>13041</id>\n  <pool>rbd</pool>\n  <namespace></namespace>\n"
        "  <image>img1</image>\n  <snap></snap>\n  <device>/dev/nbd0</device>\n"
        "  <cookie>1111</cookie>\n </device>\n</devices>\n\n"
    )


ODD = "a\x01b\x7fc\rd\be\"/\t\n\\é\u2028<&>'"


def test_json_escapes_as_ceph_does():
    printed = listing([document(0, cookie=ODD)], "json", pretty=False)
    escaped = "a\\u0001b\\u007fc\\u000dd\\u0008e\\\"/\\t\\n\\\\é\u2028<&>'"
    assert printed.endswith(f'"cookie":"{escaped}"}}]')


def test_xml_escapes_as_ceph_does():
    printed = listing([document(0, cookie=ODD)], "xml", pretty=False)
    escaped = "a&#x01;b&#x7f;c&#x0d;d&#x08;e&quot;/\t\n\\é\u2028&lt;&amp;&gt;&apos;"
    assert f"<cookie>{escaped}</cookie>" in printed


def test_a_snapshot_that_is_mapped_by_its_id_is_listed_with_it():
    assert '"snap":"@4"' in listing([document(0, snap_id=4)], "json", pretty=False)
