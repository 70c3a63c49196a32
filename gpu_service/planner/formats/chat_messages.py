"""`chat-messages`: a conversation through the chat template, loss on assistant turns. Merges and repairs no turn."""

from collections.abc import Mapping
from typing import Any

from gpu_service.planner.rendering import ChatRenderer, Rendered, read_text
from gpu_service.planner.rows import RowError


def render(row: Mapping[str, Any], chat: ChatRenderer | None) -> Rendered:
    """Raises `RowError` when the row is no conversation with an assistant's turn in it."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RowError("has no list of 'messages'")
    for at, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RowError(f"messages[{at}] is not an object")
        try:
            read_text(message, "role")
            read_text(message, "content")
        except RowError as error:
            raise RowError(f"messages[{at}] {error}") from error
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("has no assistant turn to learn from")
    if messages[0]["role"] == "assistant":
        raise RowError("starts with an assistant turn, so there is nothing to answer")
    if chat is None:
        raise RowError("is chat, and there is no chat template")
    return chat.render_conversation(messages)
