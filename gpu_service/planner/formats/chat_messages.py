"""`chat-messages`: a conversation through the chat template, loss on assistant turns. Merges and repairs no turn."""

from collections.abc import Mapping
from typing import Any

from gpu_service.planner.conversations import check_dialogue, read_messages, read_tools
from gpu_service.planner.rendering import ChatRenderer, Rendered, need_template


def render(row: Mapping[str, Any], chat: ChatRenderer | None) -> Rendered:
    """Raises `RowError` when the row is no conversation with an answer in it, `Refusal` without a template."""
    messages = read_messages(row, "messages")
    check_dialogue(messages)
    return need_template(chat).render_conversation(messages, tools=read_tools(row))
