"""Conversations of rows, checked: what a chat template is given. Repairs nothing, and leaves roles to the template."""

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_service.planner.rendering import Message, read_text
from gpu_service.planner.rows import RowError


def read_messages(row: Mapping[str, Any], key: str) -> list[Message]:
    """The messages under a key, at least one; of a message every key is kept for the template.

    Raises `RowError` when one has no role, or no text without calling a tool.
    """
    messages = row.get(key)
    if not isinstance(messages, list) or not messages:
        raise RowError(f"has no list of {key!r}")
    for at, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RowError(f"{key}[{at}] is not an object")
        try:
            _check_message(message)
        except RowError as error:
            raise RowError(f"{key}[{at}] {error}") from error
    return messages


def read_tools(row: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The row's tools as JSON schemas; None when it has none. Raises `RowError`."""
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("'tools' is not a list of objects")
    return tools


def check_dialogue(messages: Sequence[Message]) -> None:
    """Raises `RowError` unless there is an assistant's turn to learn from and something before it to answer."""
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("has no assistant turn to learn from")
    if messages[0]["role"] == "assistant":
        raise RowError("starts with an assistant turn, so there is nothing to answer")


def _check_message(message: Mapping[str, Any]) -> None:
    role = read_text(message, "role")
    calls = message.get("tool_calls")
    if calls is not None:
        if role != "assistant":
            raise RowError(f"calls tools as {role!r}; only the assistant does")
        if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise RowError("'tool_calls' is not a list of objects")
    if message.get("content") is not None or not calls:
        read_text(message, "content")
