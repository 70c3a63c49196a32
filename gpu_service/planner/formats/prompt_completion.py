"""`prompt-completion`: one user turn and one assistant turn where there is a chat template, else the two joined.

Joined, the completion and the end of sequence carry loss. Nothing is put between the two: a space is the data's own.
"""

from collections.abc import Mapping
from typing import Any

from gpu_service.planner.rendering import ChatRenderer, Rendered, read_text, render_answer


def render(row: Mapping[str, Any], chat: ChatRenderer | None) -> Rendered:
    """Raises `RowError` when the row has not both texts."""
    return render_answer(read_text(row, "prompt"), read_text(row, "completion"), chat)
