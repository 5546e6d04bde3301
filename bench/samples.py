"""The results file's native part, as samples. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.figures import Sample


def samples_of(native: Mapping[str, Any]) -> dict[str, dict[str, list[Sample]]]:
    """Return the samples of the results file's native part."""
    return {
        name: {
            cell: [Sample(**sample) for sample in several]
            for cell, several in candidate["cells"].items()
        }
        for name, candidate in native.items()
    }
