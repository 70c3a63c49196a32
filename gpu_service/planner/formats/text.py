"""`text`: running text, all of which carries loss. Joins and splits no rows."""

from collections.abc import Mapping
from typing import Any

from gpu_service.planner.rendering import ChatRenderer, Rendered, read_text


def render(row: Mapping[str, Any], chat: ChatRenderer | None) -> Rendered:
    """Raises `RowError` when the row has no text. A chat template means nothing to it."""
    text = read_text(row, "text")
    return Rendered(text=text, targets=[(0, len(text))], is_document=True)
