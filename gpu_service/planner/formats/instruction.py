"""`instruction`: what to do, perhaps on what, and the answer. Adds no words of its own.

One user turn and one assistant turn where there is a chat template, else paragraphs; loss is on the answer and its end.
"""

from collections.abc import Mapping
from typing import Any

from gpu_service.planner.rendering import ChatRenderer, Rendered, read_text, render_answer

_PARAGRAPH = "\n\n"


def render(row: Mapping[str, Any], chat: ChatRenderer | None) -> Rendered:
    """Raises `RowError` when the row lacks a text. An `input` that is absent, null or empty leaves no trace."""
    question = read_text(row, "instruction")
    if row.get("input") is not None and (subject := read_text(row, "input")):
        question += _PARAGRAPH + subject
    answer = read_text(row, "output")
    return render_answer(question if chat else question + _PARAGRAPH, answer, chat)
