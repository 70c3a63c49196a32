"""Chat templates in a sandbox: conversations to text, with the spans of assistant turns. Runs no template unsandboxed.

The environment is the one that `transformers` gives templates, but for one thing: `strftime_now` formats a fixed date,
so that the same data gives the same tokens on every day.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gpu_service.domain.errors import Refusal, refuse_user
from gpu_service.planner.rendering import Message, Rendered
from gpu_service.planner.rows import RowError

# The day that Llama's own templates fall back to.
_FIXED_DATE = datetime.datetime(2024, 7, 26)
# Noncharacters that mark what a `generation` block wrote; text that holds them is refused, so they cannot be forged.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"([{_OPEN}{_CLOSE}])")


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: the part of the text that the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class ChatTemplate:
    """One compiled template and the tokenizer's special tokens. Raises `Refusal` CHAT_TEMPLATE_UNUSABLE if broken."""

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _FIXED_DATE.strftime
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise _unusable(f"it does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)
        self.has_generation_tags = "endgeneration" in text
        self.uses_date = "strftime_now" in text

    def render_conversation(self, messages: Sequence[Message]) -> Rendered:
        """The whole conversation and its assistant turns, each with the token that ends it.

        Raises `RowError` when the template refuses the conversation, `Refusal` CHAT_TEMPLATE_UNUSABLE when turns cannot
        be told apart: the render of the first turns must begin the render of more.
        """
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if self.has_generation_tags:
            if _MARKS.search(json.dumps(messages, ensure_ascii=False)):
                raise RowError("holds a Unicode noncharacter (U+FDD0 or U+FDD1)")
            return _read_marks(self.render(messages))
        whole = self.render(messages)
        targets = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], add_generation_prompt=True)
            through = whole if index == len(messages) - 1 else self.render(messages[: index + 1])
            if not (through.startswith(before) and whole.startswith(through)):
                raise _unusable(
                    "the render of some turns does not begin the render of more, and it has no generation tags; "
                    f"turn {index} cannot be told apart"
                )
            targets.append((len(before), len(through)))
        return Rendered(text=whole, targets=targets, is_document=False)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of these turns. Raises `RowError` with the template's own message."""
        try:
            text = self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            # The template's own defect on this row, e.g. text added to a number.
            raise RowError(f"the chat template fails on the conversation: {type(error).__name__}: {error}") from error
        return text


def _read_marks(marked: str) -> Rendered:
    """Takes the marks out and remembers where they were."""
    parts: list[str] = []
    targets: list[tuple[int, int]] = []
    position = opened = 0
    for piece in _MARKS.split(marked):
        if piece == _OPEN:
            opened = position
        elif piece == _CLOSE:
            targets.append((opened, position))
        else:
            parts.append(piece)
            position += len(piece)
    return Rendered(text="".join(parts), targets=targets, is_document=False)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without the escapes for HTML that jinja2's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _unusable(message: str) -> Refusal:
    return refuse_user("CHAT_TEMPLATE_UNUSABLE", f"the chat template gives no loss mask: {message}", stage="TOKENIZER")
