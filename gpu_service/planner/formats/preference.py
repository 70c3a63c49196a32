"""`preference`: a prompt with a chosen and a rejected answer. Loss is on the answers alone; ranks nothing itself.

Prompt and answers are texts, or messages, or the prompt is what two conversations have in common at their start.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_service.planner.conversations import read_messages, read_tools
from gpu_service.planner.rendering import (
    ChatRenderer,
    Message,
    Rendered,
    RenderedPair,
    need_template,
    read_text,
    render_answer,
)
from gpu_service.planner.rows import RowError

_KEYS = ("prompt", "chosen", "rejected")


def render(row: Mapping[str, Any], chat: ChatRenderer | None) -> RenderedPair:
    """Raises `RowError` when the row has no prompt with two answers, `Refusal` for messages without a template."""
    if all(isinstance(row.get(key), str) for key in _KEYS):
        prompt, chosen, rejected = (read_text(row, key) for key in _KEYS)
        return RenderedPair(chosen=render_answer(prompt, chosen, chat), rejected=render_answer(prompt, rejected, chat))
    chosen_turns, rejected_turns = _read_turns(row, "chosen", "assistant"), _read_turns(row, "rejected", "assistant")
    if row.get("prompt") is not None:
        prompt_turns = _read_turns(row, "prompt", "user")
    else:
        prompt_turns, chosen_turns, rejected_turns = _split_prompt(chosen_turns, rejected_turns)
    for key, turns in (("chosen", chosen_turns), ("rejected", rejected_turns)):
        if not turns or turns[0]["role"] != "assistant":
            raise RowError(f"{key!r} has no answer of the assistant's after the prompt")
    if prompt_turns[-1]["role"] == "assistant":
        raise RowError("the prompt ends with an assistant turn, so there is nothing to answer")
    renderer, tools = need_template(chat), read_tools(row)

    def answer(turns: Sequence[Message]) -> Rendered:
        return renderer.render_conversation([*prompt_turns, *turns], tools=tools, first_target=len(prompt_turns))

    return RenderedPair(chosen=answer(chosen_turns), rejected=answer(rejected_turns))


def _read_turns(row: Mapping[str, Any], key: str, role: str) -> list[Message]:
    """Messages as they are; a text is one turn."""
    if isinstance(row.get(key), str):
        return [{"role": role, "content": read_text(row, key)}]
    return read_messages(row, key)


def _split_prompt(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """What both begin with, and what follows in each."""
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if not common:
        raise RowError("has no 'prompt', and 'chosen' and 'rejected' begin with different turns")
    return chosen[:common], chosen[common:], rejected[common:]
