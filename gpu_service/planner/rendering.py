"""What a dataset format makes of a row, and what it is given to make it with. Holds no format's rules."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpu_service.catalog import templates
from gpu_service.domain.errors import refuse_user
from gpu_service.planner.rows import RowError

Message = Mapping[str, Any]
# JSON schemas of the tools that a conversation may call.
Tools = Sequence[Mapping[str, Any]]


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
    """A preference pair: the prompt with either answer. Targets lie in the answers, whatever a run's loss is on."""

    chosen: Rendered
    rejected: Rendered


class ChatRenderer(Protocol):
    """Renders a conversation with the plan's chat template."""

    def render_conversation(
        self, messages: Sequence[Message], *, tools: Tools | None = None, first_target: int = 0
    ) -> Rendered:
        """Targets are the assistant's turns among `messages[first_target:]`.

        Raises `RowError` when the template refuses the conversation, `Refusal` when no mask can be had.
        """
        ...


def render_answer(question: str, answer: str, chat: ChatRenderer | None) -> Rendered:
    """One user turn and one assistant turn, or without a template the two texts joined; the answer is the target."""
    if chat is not None:
        return chat.render_conversation(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        )
    text = question + answer
    return Rendered(text=text, targets=[(len(question), len(text))], is_document=True)


def need_template(chat: ChatRenderer | None) -> ChatRenderer:
    """Raises `Refusal` CHAT_TEMPLATE_MISSING: messages are nothing without one."""
    if chat is None:
        raise refuse_user(
            "CHAT_TEMPLATE_MISSING",
            "a row is chat, and the base model has no chat template; name one of the catalog's in "
            f"hyperparameters.chat_template: {', '.join(templates.REGISTRY)}",
            field="hyperparameters.chat_template",
            stage="TOKENIZER",
            available=",".join(templates.REGISTRY),
        )
    return chat


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
