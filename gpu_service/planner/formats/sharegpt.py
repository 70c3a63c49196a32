"""`sharegpt`: `conversations` of `from` and `value`, as a chat. Knows four speakers and guesses at no other."""

from collections.abc import Mapping
from typing import Any

from gpu_service.planner.conversations import check_dialogue
from gpu_service.planner.rendering import ChatRenderer, Rendered, need_template, read_text
from gpu_service.planner.rows import RowError

_ROLES = {"system": "system", "human": "user", "gpt": "assistant", "tool": "tool"}


def render(row: Mapping[str, Any], chat: ChatRenderer | None) -> Rendered:
    """Raises `RowError` when the row is no conversation with an answer in it, `Refusal` without a template."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise RowError("has no list of 'conversations'")
    messages = [_read_turn(turn, f"conversations[{at}]") for at, turn in enumerate(turns)]
    check_dialogue(messages)
    return need_template(chat).render_conversation(messages)


def _read_turn(turn: object, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise RowError(f"{where} is not an object")
    try:
        speaker, value = read_text(turn, "from"), read_text(turn, "value")
    except RowError as error:
        raise RowError(f"{where} {error}") from error
    if speaker not in _ROLES:
        raise RowError(f"{where} is from {speaker[:32]!r}, who is none of {', '.join(_ROLES)}")
    return {"role": _ROLES[speaker], "content": value}
