"""Rows are read one line at a time, and what is wrong with one is said with dataset and line."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from gpu_service.catalog import datasets as dataset_formats
from gpu_service.domain.errors import Refusal
from gpu_service.domain.spec import DatasetReference
from gpu_service.planner import rows
from gpu_service.planner.chat_template import ChatTemplate
from gpu_service.planner.formats import chat_messages, prompt_completion, text
from gpu_service.planner.rows import RowError, find_blob, read_rows
from tests.fakes.datasets import write_blob
from tests.fakes.tiny_models import CHAT_TEMPLATE, TOOL_TEMPLATE

CHAT = ChatTemplate(CHAT_TEMPLATE, {})


def read(tmp_path: Path, content: bytes) -> list[tuple[int, dict[str, Any]]]:
    sha256 = write_blob(tmp_path, 7, content, "text")["sha256"]
    reference = DatasetReference(dataset_id=7, sha256=sha256)
    return list(read_rows(find_blob(tmp_path, reference), reference))


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}'
    assert read(tmp_path, content) == [(1, {"text": "a"}), (4, {"text": "b"})]
    assert read(tmp_path, b"") == []


@pytest.mark.parametrize(
    "line",
    [b"{", b"[1]", b"3", b'{"text": "\xff"}', b'{"a":' * 100_000, b'{"text": "' + b"a" * 2000 + b'"}', b"\0", b"nul"],
    ids=["cut", "list", "number", "utf-8", "deep", "long", "zero", "word"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAXIMUM_LINE_BYTES", 1000 if len(line) < 10_000 else 10**7)
    with pytest.raises(Refusal) as caught:
        read(tmp_path, b'{"text": "a"}\n' + line + b"\n")
    assert caught.value.reason == "DATASET_MALFORMED"
    assert caught.value.details == {"dataset_id": "7", "line": "2"}


def test_a_damaged_blob_is_refused(tmp_path: Path) -> None:
    reference = DatasetReference(dataset_id=7, sha256=write_blob(tmp_path, 7, b'{"a": 1}\n', "text")["sha256"])
    find_blob(tmp_path, reference).write_bytes(b'{"a": 2}\n')
    with pytest.raises(Refusal, match="CHECKSUM_MISMATCH"):
        list(read_rows(find_blob(tmp_path, reference), reference))


@pytest.mark.parametrize("sha256", ["", "0" * 64, "../" * 20 + "etcd", "A" * 64])
def test_a_blob_that_is_not_there(tmp_path: Path, sha256: str) -> None:
    with pytest.raises(Refusal, match="BLOB_NOT_FOUND"):
        find_blob(tmp_path, DatasetReference(dataset_id=7, sha256=sha256))


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        ["hi"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["hi"]}],
        [{"role": 1, "content": "hi"}],
        [{"role": "user", "content": "hi"}],
        [{"role": "assistant", "content": "hi"}],
        [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "hi"}],
    ],
)
def test_bad_conversations(messages: Any) -> None:
    with pytest.raises(RowError):
        chat_messages.render({"messages": messages}, CHAT)


@pytest.mark.parametrize(
    "row", [{}, {"prompt": "a"}, {"prompt": 1, "completion": "b"}, {"prompt": "a", "completion": None}]
)
def test_bad_prompts(row: dict[str, Any]) -> None:
    with pytest.raises(RowError):
        prompt_completion.render(row, CHAT)


def test_prompt_and_completion_are_a_conversation_where_there_is_a_template() -> None:
    row = {"prompt": "Q", "completion": "A"}
    chat = prompt_completion.render(row, CHAT)
    assert chat.text == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    assert not chat.is_document
    joined = prompt_completion.render(row, None)
    assert (joined.text, joined.targets, joined.is_document) == ("QA", [(1, 2)], True)


def test_text_is_a_document_with_or_without_a_template() -> None:
    rendered = text.render({"text": "abc"}, CHAT)
    assert (rendered.text, rendered.targets, rendered.is_document) == ("abc", [(0, 3)], True)
    with pytest.raises(RowError, match="'text'"):
        text.render(json.loads('{"text": 3}'), None)


def render_all(format: str, row: dict[str, Any], chat: ChatTemplate | None = CHAT) -> Any:
    return importlib.import_module(dataset_formats.REGISTRY[format].builder).render(row, chat)


def test_an_instruction_is_a_question_with_what_it_is_about() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    start, end = "<|im_start|>user\nAdd.", "<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    chat = render_all("instruction", row)
    assert chat.text == f"{start}\n\n1 2{end}"
    assert [chat.text[first:last] for first, last in chat.targets] == ["3<|im_end|>\n"]
    for nothing in ({"input": ""}, {"input": None}, {}):
        bare = {"instruction": "Add.", "output": "3", **nothing}
        assert render_all("instruction", bare).text == start + end
        assert render_all("instruction", bare, None).text == "Add.\n\n3"
    joined = render_all("instruction", row, None)
    assert (joined.text, joined.targets, joined.is_document) == ("Add.\n\n1 2\n\n3", [(11, 12)], True)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a"},
        {"output": "a"},
        {"instruction": None, "output": "a"},
        {"instruction": "a", "input": 3, "output": "b"},
        {"instruction": "a", "output": "\ud800"},
    ],
)
def test_bad_instructions(row: dict[str, Any]) -> None:
    with pytest.raises(RowError):
        render_all("instruction", row)


def test_sharegpt_is_the_same_chat_under_other_names() -> None:
    turns = [("system", "S"), ("human", "Q"), ("gpt", "A"), ("tool", "T"), ("gpt", "B")]
    roles = {"system": "system", "human": "user", "gpt": "assistant", "tool": "tool"}
    messages = [{"role": roles[speaker], "content": text} for speaker, text in turns]
    shared = render_all("sharegpt", {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]})
    assert shared == render_all("chat-messages", {"messages": messages})
    assert [shared.text[first:last] for first, last in shared.targets] == ["A<|im_end|>\n", "B<|im_end|>\n"]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (None, "no list"),
        ([], "no list"),
        (["hi"], r"conversations\[0\] is not an object"),
        ([{"from": "human"}], r"conversations\[0\] has no 'value'"),
        ([{"from": "bing", "value": "hi"}], "none of system, human, gpt, tool"),
        ([{"from": "human", "value": "hi"}], "no assistant turn"),
        ([{"from": "gpt", "value": "hi"}], "starts with an assistant turn"),
    ],
)
def test_bad_sharegpt(turns: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        render_all("sharegpt", {"conversations": turns})


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, {"role": "assistant", "tool_calls": []}]}, "no 'content'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "NoneType"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": "add"}]}, "'tool_calls' is not a list"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [1]}]}, "'tool_calls' is not a list"),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "only the assistant"),
        ({"messages": [USER, ANSWER], "tools": "add"}, "'tools' is not a list"),
        ({"messages": [USER, ANSWER], "tools": ["add"]}, "'tools' is not a list"),
    ],
)
def test_bad_tools(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        chat_messages.render(row, CHAT)


def test_tools_and_calls_reach_the_template() -> None:
    chat = ChatTemplate(TOOL_TEMPLATE, {})
    row = {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "name": "add", "content": "1"},
            ANSWER,
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    rendered = chat_messages.render(row, chat)
    assert rendered.text.startswith('[tools] {"type": "function", "function": {"name": "add"}}\n')
    targets = [rendered.text[first:last] for first, last in rendered.targets]
    assert targets == ['[call] {"name": "add", "arguments": {"a": 1}}</s>', "A</s>"]
    assert "[tools]" not in chat_messages.render({**row, "tools": None}, chat).text


def test_a_half_of_a_surrogate_pair_is_found_wherever_it_is() -> None:
    call = {"function": {"name": "add", "arguments": {"a": "\ud800"}}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    with pytest.raises(RowError, match="surrogate"):
        chat_messages.render(row, ChatTemplate(TOOL_TEMPLATE, {}))


def test_every_format_has_its_reader() -> None:
    for entry in dataset_formats.REGISTRY.values():
        assert callable(importlib.import_module(entry.builder).render)
