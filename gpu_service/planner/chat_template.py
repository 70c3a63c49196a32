"""Chat templates in a sandbox: conversations to text, with the spans of assistant turns. Runs no template unsandboxed.

The environment is the one that `transformers` gives templates, but for one thing: `strftime_now` formats a fixed date,
so that the same data gives the same tokens on every day.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gpu_service.domain.errors import Refusal, refuse_user
from gpu_service.planner.rendering import Message, Rendered, Tools
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


# Names that a message's reasoning goes by; templates read the first, older ones the second.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A base's template, compiled, and the tokenizer's special tokens.

    `tool_text` is the template for rows that bring tools, None where one template is for all rows. Raises `Refusal`
    CHAT_TEMPLATE_UNUSABLE if it is broken.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str], *, tool_text: str | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _FIXED_DATE.strftime
        self._plain = _compile(environment, text)
        self._with_tools = self._plain if tool_text is None else _compile(environment, tool_text)
        self._special_tokens = dict(special_tokens)
        self.uses_date = "strftime_now" in text or "strftime_now" in (tool_text or "")

    def render_conversation(
        self, messages: Sequence[Message], *, tools: Tools | None = None, first_target: int = 0
    ) -> Rendered:
        """The whole conversation; its targets are the assistant's turns from message `first_target` on, each with the
        token that ends it.

        Raises `RowError` when the template refuses the conversation, `Refusal` CHAT_TEMPLATE_UNUSABLE when turns cannot
        be told apart: the render of the first turns must begin the render of more.
        """
        template = self._template_for(tools)
        if template.has_generation_tags:
            return self._follow_tags(messages, tools, first_target)
        whole = self.render(messages, tools=tools)
        targets = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < first_target:
                continue
            before = self.render(messages[:index], tools=tools, add_generation_prompt=True)
            through = whole if index == len(messages) - 1 else self.render(messages[: index + 1], tools=tools)
            if not (through.startswith(before) and whole.startswith(through)):
                raise _unusable(
                    "the render of some turns does not begin the render of more, and it has no generation tags; "
                    f"turn {index} cannot be told apart"
                )
            targets.append((len(before), len(through)))
        return Rendered(text=whole, targets=targets, is_document=False)

    def render(
        self, messages: Sequence[Message], *, tools: Tools | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of these turns. Raises `RowError` with the template's own message."""
        try:
            text = self._template_for(tools).compiled.render(
                messages=[_prepare(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
            text.encode()
        except jinja2.TemplateError as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from error
        except UnicodeEncodeError as error:
            raise RowError("holds half of a surrogate pair, which is no character") from error
        except (ArithmeticError, AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            # The template's own defect on this row, e.g. text added to a number.
            raise RowError(f"the chat template fails on the conversation: {type(error).__name__}: {error}") from error
        except RecursionError as error:
            raise RowError("is nested too deeply for the chat template") from error
        return text

    def _follow_tags(self, messages: Sequence[Message], tools: Tools | None, first_target: int) -> Rendered:
        if _MARKS.search(json.dumps([list(messages), tools], ensure_ascii=False)):
            raise RowError("holds a Unicode noncharacter (U+FDD0 or U+FDD1)")
        rendered = _read_marks(self.render(messages, tools=tools))
        if first_target:
            # What the turns before it are tagged with comes first.
            earlier = _read_marks(self.render(messages[:first_target], tools=tools))
            rendered = replace(rendered, targets=rendered.targets[len(earlier.targets) :])
        return rendered

    def _template_for(self, tools: Tools | None) -> "_Compiled":
        return self._plain if tools is None else self._with_tools


@dataclass(frozen=True, kw_only=True)
class _Compiled:
    compiled: jinja2.Template
    has_generation_tags: bool


def _compile(environment: jinja2.Environment, text: str) -> _Compiled:
    try:
        return _Compiled(compiled=environment.from_string(text), has_generation_tags="endgeneration" in text)
    except jinja2.TemplateError as error:
        raise _unusable(f"it does not compile: {error}") from error


def _prepare(message: Message) -> dict[str, Any]:
    """A message as `transformers` gives it to templates: without keys that are null, its reasoning under each name."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in _REASONING_KEYS if key in kept), None)
    if reasoning is not None:
        kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
    return kept


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
