"""Loss spans come from prefix renders or generation tags; a template with neither is refused; all in a sandbox."""

from typing import Any

import pytest

from gpu_service.catalog import templates
from gpu_service.domain.errors import Refusal
from gpu_service.planner.chat_template import ChatTemplate
from gpu_service.planner.rows import RowError
from tests.fakes.tiny_models import CHAT_TEMPLATE

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
TAGGED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
# Forgets what an earlier assistant turn said, as templates that drop old reasoning do.
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def spans(text: str, turns: list[dict[str, Any]] = TURNS) -> list[str]:
    rendered = ChatTemplate(text, TOKENS).render_conversation(turns)
    return [rendered.text[start:end] for start, end in rendered.targets]


def test_turns_and_what_ends_them() -> None:
    assert spans(CHAT_TEMPLATE) == ["A1<|im_end|>\n", "A2<|im_end|>\n"]


@pytest.mark.parametrize("name", templates.REGISTRY)
def test_every_catalog_template_gives_a_mask(name: str) -> None:
    entry = templates.REGISTRY[name]
    found = spans(entry.read_text())
    assert [text[:2] for text in found] == ["A1", "A2"]
    end = entry.end_of_turn or TOKENS["eos_token"]
    assert all(text.rstrip().endswith(end) for text in found)


def test_a_turn_after_the_last_answer_carries_nothing() -> None:
    assert spans(CHAT_TEMPLATE, [*TURNS, {"role": "user", "content": "Q3"}]) == ["A1<|im_end|>\n", "A2<|im_end|>\n"]


def test_generation_tags_are_followed_and_leave_no_trace() -> None:
    rendered = ChatTemplate(TAGGED, TOKENS).render_conversation(TURNS)
    assert rendered.text == "[user]Q1[assistant]A1</s>[user]Q2[assistant]A2</s>"
    assert spans(TAGGED) == ["A1</s>", "A2</s>"]


def test_a_template_that_is_not_prefix_stable_is_refused() -> None:
    with pytest.raises(Refusal) as caught:
        spans(FORGETFUL)
    assert caught.value.reason == "CHAT_TEMPLATE_UNUSABLE"
    assert spans(FORGETFUL, TURNS[:2]) == ["A1"]


def test_marks_cannot_be_forged() -> None:
    with pytest.raises(RowError, match="noncharacter"):
        spans(TAGGED, [{"role": "user", "content": "\ufdd0Q\ufdd1"}, TURNS[1]])


def test_a_broken_template_is_refused() -> None:
    with pytest.raises(Refusal, match="CHAT_TEMPLATE_UNUSABLE"):
        ChatTemplate("{% for %}", TOKENS)


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages[9].content.strip() }}",
        "{{ messages + 1 }}",
        "{{ 1 // 0 }}",
    ],
)
def test_what_a_template_may_not_do(text: str) -> None:
    with pytest.raises(RowError, match="the chat template"):
        spans(text)


def test_the_date_is_the_same_on_every_day() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {})
    assert template.render(TURNS) == "26 Jul 2024"
    assert template.uses_date


def test_helpers_that_templates_expect() -> None:
    text = (
        "{{ {'a': '<é>'} | tojson }}{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}x{% endfor %}"
    )
    assert ChatTemplate(text, {}).render(TURNS) == '{"a": "<é>"}x'
