"""A conversation to token ids, by the chat template, and what ends the answer to it. Refuses what has no render."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from gpu_service.catalog import templates
from gpu_service.domain.errors import Refusal, refuse_user

# What a template does on a conversation that it was not written for, besides its own refusals.
_TEMPLATE_DEFECTS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """`end_token_ids` and `end_text` (empty: none) are what the template writes behind an answer."""

    token_ids: list[int]
    end_token_ids: tuple[int, ...] = ()
    end_text: str = ""


def render(tokenizer: Any, messages: Sequence[dict[str, str]], *, chat_template: str) -> Prompt:
    """The prompt of a conversation; `chat_template` is a catalog id, empty for the tokenizer's own.

    Without any template one user's turn alone is taken as it is, as prompt-completion data is trained. Raises `Refusal`
    CHAT_TEMPLATE_MISSING, CHAT_TEMPLATE_UNUSABLE.
    """
    end_token_ids: tuple[int, ...] = ()
    end_text = ""
    if chat_template:
        entry = templates.REGISTRY[chat_template]
        tokenizer.chat_template = entry.read_text()
        written = tokenizer.encode(entry.end_of_turn, add_special_tokens=False) if entry.end_of_turn else []
        # One token of its own ends the turn; in a vocabulary without it, its text does.
        end_token_ids = tuple(written) if len(written) == 1 else ()
        end_text = entry.end_of_turn if len(written) > 1 else ""
    elif tokenizer.chat_template is None:
        if [message["role"] for message in messages] == ["user"]:
            return Prompt(token_ids=list(tokenizer(messages[0]["content"])["input_ids"]))
        raise refuse_user(
            "CHAT_TEMPLATE_MISSING",
            "the base model has no chat template: ask it with one user message, or name a template of the catalog",
            field="chat_template",
            available=",".join(templates.REGISTRY),
        )
    try:
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise _unusable(f"the chat template refuses the conversation: {error}") from error
    except _TEMPLATE_DEFECTS as error:
        raise _unusable(f"the chat template fails on the conversation: {type(error).__name__}: {error}") from error
    return Prompt(token_ids=list(encoded["input_ids"]), end_token_ids=end_token_ids, end_text=end_text)


def _unusable(message: str) -> Refusal:
    return refuse_user("CHAT_TEMPLATE_UNUSABLE", message, field="messages")
