"""A table in Markdown. Knows nothing of what stands in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# A file of benchmarks/results.
Result = Mapping[str, Any]


def table(heads: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> list[str]:
    """Lines of a table; none where there are no rows."""
    if not rows:
        return []
    lines = [heads, ("---",) * len(heads), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
