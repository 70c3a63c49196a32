"""The six shapes of a row, each with its keys and its check. A check gives the characters of text that the row has.

What a node would refuse to render is refused here already; nothing is repaired, counted in tokens or rendered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from control_service.domain.dataset_files import Trouble
from control_service.domain.json_text import shown

ROLES = frozenset({"system", "user", "assistant", "tool"})
SPEAKERS = {"system": "system", "human": "user", "gpt": "assistant", "tool": "tool"}

Row = Mapping[str, Any]


def check_row(row: Row, format: str) -> int:
    """Characters of text of a row of this format. Trouble."""
    return _CHECKS[format](row)


def detect_format(keys: Sequence[str] | Row) -> str:
    """The one format that has these keys. Trouble when none has, or several have."""
    found = [name for name, wanted in KEYS.items() if wanted <= set(keys)]
    if not found:
        raise UnknownShape(f"has none of the known shapes ({SHAPES})")
    if len(found) > 1:
        raise Trouble(f"has the keys of several formats ({', '.join(found)}); name the format")
    return found[0]


class UnknownShape(Trouble):
    """The row's keys are those of no format."""


def _text(row: Row, key: str, *, where: str = "", may_be_empty: bool = True) -> int:
    if key not in row:
        raise Trouble(f"{where}has no {key!r}", key=key)
    value = row[key]
    if not isinstance(value, str):
        raise Trouble(f"{where}{key!r} is not a string", key=key)
    if not may_be_empty and not value:
        raise Trouble(f"{where}{key!r} is empty", key=key)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Trouble(f"{where}{key!r} holds half of a surrogate pair", key=key) from error
    return len(value)


def _turns(row: Row, key: str) -> list[Row]:
    if key not in row:
        raise Trouble(f"has no {key!r} list", key=key)
    turns = row[key]
    if not isinstance(turns, list):
        raise Trouble(f"{key!r} is not a list", key=key)
    if not turns:
        raise Trouble(f"{key!r} is empty", key=key)
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Trouble(f"{key}[{index}]: is not an object", key=key)
    return turns


def _one_of(turn: Row, key: str, known: Sequence[str], *, where: str) -> None:
    _text(turn, key, where=where)
    if turn[key] not in known:
        raise Trouble(f"{where}{key} {shown(turn[key])} is none of {', '.join(known)}", key=key)


def _messages(row: Row, key: str) -> int:
    """Characters of a list of messages: contents, and what tools are called with."""
    characters = 0
    for index, message in enumerate(_turns(row, key)):
        where = f"{key}[{index}]: "
        _one_of(message, "role", sorted(ROLES), where=where)
        calls = message.get("tool_calls")
        characters += _tool_calls(message, where) if calls is not None else 0
        if message.get("content") is not None or not calls:
            characters += _text(message, "content", where=where)
    return characters


def _tool_calls(message: Row, where: str) -> int:
    if message["role"] != "assistant":
        raise Trouble(f"{where}calls tools as {message['role']!r}; only the assistant does", key="tool_calls")
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        raise Trouble(f"{where}'tool_calls' is not a list", key="tool_calls")
    characters = 0
    for index, call in enumerate(calls):
        inside = f"{where}tool_calls[{index}]: "
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise Trouble(f"{inside}is not an object", key="tool_calls")
        characters += _text(function, "name", where=inside, may_be_empty=False)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            characters += _text(function, "arguments", where=inside)
        elif arguments is not None and not isinstance(arguments, dict):
            raise Trouble(f"{inside}'arguments' is neither an object nor a string", key="tool_calls")
    return characters


def _check_tools(row: Row) -> None:
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Trouble("'tools' is not a list of objects", key="tools")


def _check_dialogue(roles: Sequence[str], key: str) -> None:
    if "assistant" not in roles:
        raise Trouble("has no assistant turn to learn from", key=key)
    if roles[0] == "assistant":
        raise Trouble("starts with an assistant turn, so there is nothing to answer", key=key)


def _check_chat(row: Row) -> int:
    characters = _messages(row, "messages")
    _check_dialogue([message["role"] for message in row["messages"]], "messages")
    _check_tools(row)
    return characters


def _check_sharegpt(row: Row) -> int:
    characters = 0
    turns = _turns(row, "conversations")
    for index, turn in enumerate(turns):
        where = f"conversations[{index}]: "
        _one_of(turn, "from", list(SPEAKERS), where=where)
        characters += _text(turn, "value", where=where)
    _check_dialogue([SPEAKERS[turn["from"]] for turn in turns], "conversations")
    return characters


def _check_prompt_completion(row: Row) -> int:
    return _text(row, "prompt") + _text(row, "completion", may_be_empty=False)


def _check_instruction(row: Row) -> int:
    characters = _text(row, "instruction") + _text(row, "output", may_be_empty=False)
    return characters + (_text(row, "input") if row.get("input") is not None else 0)


def _check_text(row: Row) -> int:
    return _text(row, "text", may_be_empty=False)


def _check_preference(row: Row) -> int:
    characters = _text_or_messages(row, "chosen") + _text_or_messages(row, "rejected")
    chosen, rejected = _as_turns(row["chosen"], "assistant"), _as_turns(row["rejected"], "assistant")
    if row.get("prompt") is not None:
        characters += _text_or_messages(row, "prompt")
        prompt = _as_turns(row["prompt"], "user")
    else:
        common = _num_common(chosen, rejected)
        if not common:
            raise Trouble("has no 'prompt', and 'chosen' and 'rejected' begin with different turns", key="prompt")
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns or turns[0]["role"] != "assistant":
            raise Trouble(f"{key!r} has no answer of the assistant's after the prompt", key=key)
    if prompt[-1]["role"] == "assistant":
        raise Trouble("the prompt ends with an assistant turn, so there is nothing to answer", key="prompt")
    _check_tools(row)
    return characters


def _text_or_messages(row: Row, key: str) -> int:
    if isinstance(row.get(key), list):
        return _messages(row, key)
    if key in row and not isinstance(row[key], str):
        raise Trouble(f"{key!r} is neither a string nor a list of messages", key=key)
    return _text(row, key)


def _as_turns(value: str | list[Row], role: str) -> list[Row]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _num_common(first: Sequence[Row], second: Sequence[Row]) -> int:
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    return common


KEYS: Mapping[str, frozenset[str]] = {
    "chat-messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "prompt-completion": frozenset({"prompt", "completion"}),
    "instruction": frozenset({"instruction", "output"}),
    "text": frozenset({"text"}),
    "preference": frozenset({"chosen", "rejected"}),
}
# Keys that a format gives a meaning to.
KNOWN_KEYS = frozenset({"input", "tools"}).union(*KEYS.values())
SHAPES = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys in KEYS.items())
_CHECKS: Mapping[str, Callable[[Row], int]] = {
    "chat-messages": _check_chat,
    "sharegpt": _check_sharegpt,
    "prompt-completion": _check_prompt_completion,
    "instruction": _check_instruction,
    "text": _check_text,
    "preference": _check_preference,
}
