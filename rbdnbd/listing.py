"""The list of mappings as `rbd-nbd list-mapped` prints it: plain, JSON or XML, byte for byte.

The bytes are those of Ceph's formatters (rbd-nbd 16.2 was run to see them): columns are as wide as
their longest cell counted in UTF-8 bytes, control characters are escaped in JSON and XML, and an
empty plain list is nothing at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

KEYS: Final = ("id", "pool", "namespace", "image", "snap", "device", "cookie")
FORMATS: Final = ("plain", "json", "xml")
_JSON: Final = {"\n": "\\n", "\t": "\\t", '"': '\\"', "\\": "\\\\"}
_XML: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;"}

Row = Mapping[str, int | str]


def listing(documents: Sequence[Mapping[str, Any]], style: str, *, pretty: bool) -> str:
    """Return the list of mappings in one of FORMATS; `pretty` is ignored for a plain one."""
    rows = [_row(document) for document in documents]
    if style == "json":
        return _json(rows, pretty=pretty)
    if style == "xml":
        return _xml(rows, pretty=pretty)
    return _plain(rows)


def _row(document: Mapping[str, Any]) -> Row:
    """Pick the columns; a snapshot that was mapped by its id is told as @ID."""
    row = {key: document[key] for key in KEYS}
    if not row["snap"] and document.get("snap_id") is not None:
        row["snap"] = f"@{document['snap_id']}"
    return row


def _plain(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    cells = [list(KEYS)]
    cells += [[str(row[key]) or ("-" if key == "snap" else "") for key in KEYS] for row in rows]
    widths = [max(_width(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)
        )
        for line in cells
    )
    return "".join(f"{line}\n" for line in lines)


def _width(text: str) -> int:
    return len(text.encode(errors="surrogateescape"))


def _json(rows: Sequence[Row], *, pretty: bool) -> str:
    begin, between, end = ("\n        ", ": ", "\n    ") if pretty else ("", ":", "")
    objects = [
        "{" + ",".join(f'{begin}"{key}"{between}{_value(row[key])}' for key in KEYS) + end + "}"
        for row in rows
    ]
    if not pretty:
        return f"[{','.join(objects)}]"
    if not objects:
        return "[]\n"
    return "[\n    " + ",\n    ".join(objects) + "\n]\n"


def _value(value: int | str) -> str:
    if isinstance(value, int):
        return str(value)
    text = re.sub(r'[\x00-\x1f\x7f"\\]', lambda m: _JSON.get(m[0], f"\\u{ord(m[0]):04x}"), value)
    return f'"{text}"'


def _xml(rows: Sequence[Row], *, pretty: bool) -> str:
    newline, indent = ("\n", " ") if pretty else ("", "")
    lines = ["<devices>"]
    for row in rows:
        lines.append(f"{indent}<device>")
        lines += [f"{indent * 2}<{key}>{_text(row[key])}</{key}>" for key in KEYS]
        lines.append(f"{indent}</device>")
    lines.append("</devices>")
    return "".join(line + newline for line in lines) + newline


def _text(value: int | str) -> str:
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f&<>'\"]",
        lambda m: _XML.get(m[0], f"&#x{ord(m[0]):02x};"),
        str(value),
    )
