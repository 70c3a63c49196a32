"""What a dataset format makes of a row, and what it is given to make it with. Holds no format's rules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpu_service.planner.rows import RowError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Rendered:
    """Text to tokenize. `targets` are character spans [start, end) that carry loss, in order.

    `is_document` asks for the tokenizer's own beginning and end of sequence around it, the end carrying loss; a chat
    template writes its own.
    """

    text: str
    targets: Sequence[tuple[int, int]]
    is_document: bool


@dataclass(frozen=True)
class RenderedPair:
    """A preference pair: the prompt with either answer. Targets are in the answers, whatever else a run's loss is on."""

    chosen: Rendered
    rejected: Rendered


class ChatRenderer(Protocol):
    """Renders a conversation with the plan's chat template."""

    def render_conversation(self, messages: Sequence[Message]) -> Rendered:
        """Raises `RowError` when the template refuses the conversation, `Refusal` when no mask can be had."""
        ...


def read_text(row: Mapping[str, Any], key: str) -> str:
    """The text under a key. Raises `RowError` when it is absent, no text, or cannot be written as UTF-8."""
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"has no {key!r}" if key not in row else f"{key!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{key!r} holds half of a surrogate pair, which is no character") from error
    return value
