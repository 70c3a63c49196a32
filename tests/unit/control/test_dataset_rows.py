"""Rows of datasets: the six shapes, what is refused, how the place is named, and what is counted."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from control_service.api.errors import trailing_metadata
from control_service.domain.dataset import HistogramBucket
from control_service.domain.dataset_files import FileLimits
from control_service.domain.dataset_rows import preview_rows
from control_service.domain.errors import InvalidArgument, ResourceExhausted
from control_service.domain.row_statistics import DIGEST_BYTES, DigestSet
from tests.fakes.dataset_files import as_json_lines, read_file

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOLS = {
    "messages": [
        {"role": "system", "content": "You add."},
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "3"},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
}
SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
PAIR = {"prompt": "hi", "completion": "hello"}
INSTRUCTION = {"instruction": "greet", "input": "Ada", "output": "hello, Ada"}
TEXT = {"text": "hello"}
PREFERENCE = {"prompt": "hi", "chosen": "hello", "rejected": "go away"}
PREFERENCE_CHAT = {
    "chosen": CHAT["messages"],
    "rejected": [CHAT["messages"][0], {"role": "assistant", "content": "no"}],
}


def _refusal(data: bytes, format: str = "", limits: FileLimits | None = None) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as refused:
        read_file(data, format=format, limits=limits)
    return refused.value


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (CHAT, "chat-messages"),
        (TOOLS, "chat-messages"),
        (SHAREGPT, "sharegpt"),
        (PAIR, "prompt-completion"),
        (INSTRUCTION, "instruction"),
        ({"instruction": "greet", "output": "hello"}, "instruction"),
        (TEXT, "text"),
        (PREFERENCE, "preference"),
        (PREFERENCE_CHAT, "preference"),
        ({**PREFERENCE, "prompt": [CHAT["messages"][0]]}, "preference"),
    ],
)
def test_formats_are_found_from_the_first_row(row: dict[str, Any], format: str) -> None:
    read = read_file(as_json_lines([row, row, row]))
    assert (read.summary.format, read.summary.num_examples, read.file_format) == (format, 3, "jsonl")
    assert read.rows == [row, row, row]


def test_blank_lines_windows_line_ends_a_mark_and_a_missing_last_line_end_are_fine() -> None:
    data = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}'
    assert read_file(data).summary.num_examples == 2
    assert [(row.line, row.json) for row in preview_rows(io.BytesIO(data), num_rows=9)] == [
        (1, '{"text": "a"}'),
        (4, '{"text": "b"}'),
    ]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"   ", b"[]", b'{"data": []}', b"prompt,completion\n"])
def test_an_empty_file(data: bytes) -> None:
    assert _refusal(data).reason == "DATASET_EMPTY"


@pytest.mark.parametrize(
    ("line", "place", "says"),
    [
        (b"{", "line 2, column 2", "not JSON"),
        (b'{"text": "a"} trailing', "line 2, column 15", "not JSON"),
        (b'{"text": "\xff"}', "line 2, column 11", "not UTF-8 at byte 11"),
        (b"[1]", "line 2", "not a JSON object"),
        (b'"text"', "line 2", "not a JSON object"),
        (b'{"text": 1}', "line 2", "'text' is not a string"),
        (b'{"text": ""}', "line 2", "'text' is empty"),
        (b'{"txt": "a"}', "line 2", "has no 'text'"),
        (b'{"text": NaN}', "line 2", "NaN is not a JSON number"),
        (b'{"text": "a", "n": [-Infinity]}', "line 2", "-Infinity is not a JSON number"),
        (b'{"text": "a", "n": 1e999}', "line 2", "too large for JSON"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 2", "not JSON that can be read"),
        (b'{"text": "a", "text": "b"}', "line 2", "has the key 'text' twice"),
        (b'{"text": "a", "x": {"k": 1, "k": 2}}', "line 2", "has the key 'k' twice"),
        (b'{"text": "\\ud800"}', "line 2", "surrogate"),
        (b'{"text": "a", "\\udfff": 1}', "line 2", "surrogate"),
        (b'{"text": "a\x01"}', "line 2, column 12", "Invalid control character"),
        (b'{"text": "a", "x": ' + b"[" * 40 + b"]" * 40 + b"}", "line 2", "nested deeper"),
        (b'{"text": ' + b"[" * 100_000, "line 2", "nested deeper"),
    ],
)
def test_a_bad_line_is_named(line: bytes, place: str, says: str) -> None:
    refusal = _refusal(as_json_lines([TEXT]) + line + b"\n" + as_json_lines([TEXT]))
    assert refusal.reason == "DATASET_MALFORMED"
    assert [violation.field for violation in refusal.violations] == [place]
    assert says in refusal.violations[0].description
    assert (refusal.details["file_format"], refusal.details["line"]) == ("jsonl", "2")
    assert refusal.message.startswith(f"jsonl: {place}: ")


def test_many_keys_of_which_the_last_comes_twice_take_one_pass() -> None:
    """Comparing each key with all others would take hours for these, and hold the interpreter."""
    keys = ", ".join(f'"{number}": 1' for number in range(200_000))
    refusal = _refusal(f'{{"text": "a", {keys}, "199999": 2}}\n'.encode())
    assert "has the key '199999' twice" in refusal.message


def test_brackets_inside_of_strings_are_no_depth() -> None:
    assert read_file(as_json_lines([{"text": '[{"\\' * 1000}])).summary.num_examples == 1


ANSWER = {"role": "assistant", "content": "a"}
ASK = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "format", "says"),
    [
        ({"messages": []}, "chat-messages", "is empty"),
        ({"messages": "hi"}, "chat-messages", "not a list"),
        ({"messages": [1]}, "chat-messages", "messages[0]: is not an object"),
        ({"messages": [{"content": "a"}]}, "chat-messages", "messages[0]: has no 'role'"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "chat-messages", "role 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, "chat-messages", "'content' is not a string"),
        ({"messages": [ASK]}, "chat-messages", "no assistant turn"),
        ({"messages": [ANSWER, ASK]}, "chat-messages", "starts with an assistant turn"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": {}}]}, "chat-messages", "'tool_calls' is not a list"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [1]}]}, "chat-messages", "tool_calls[0]: is not an object"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [{}]}]}, "chat-messages", "has no 'name'"),
        ({"messages": [{**ASK, "tool_calls": [CALL]}, ANSWER]}, "chat-messages", "only the assistant does"),
        (
            {"messages": [ASK, {**ANSWER, "tool_calls": [{"name": "f", "arguments": 1}]}]},
            "chat-messages",
            "neither an object nor a string",
        ),
        ({"messages": [ASK, ANSWER], "tools": {}}, "chat-messages", "'tools' is not a list"),
        ({"prompt": "a", "completion": "b"}, "chat-messages", "has no 'messages'"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "sharegpt", "from 'bot'"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "sharegpt", "starts with an assistant turn"),
        ({"conversations": [{"from": "human", "value": 3}]}, "sharegpt", "conversations[0]: 'value' is not a string"),
        ({"instruction": "a", "output": ""}, "instruction", "'output' is empty"),
        ({"instruction": "a", "output": "b", "input": 3}, "instruction", "'input' is not a string"),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "preference", "'chosen' is neither a string nor a list"),
        ({"prompt": "a", "chosen": "b"}, "preference", "has no 'rejected'"),
        ({"chosen": "a", "rejected": "b"}, "preference", "has no 'prompt'"),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK]}, "preference", "'rejected' has no answer"),
        ({"prompt": "q", "chosen": [ASK, ANSWER], "rejected": "no"}, "preference", "'chosen' has no answer"),
        ({"prompt": [ASK, ANSWER], "chosen": "a", "rejected": "b"}, "preference", "the prompt ends with an assistant"),
    ],
)
def test_bad_rows_of_each_format(row: dict[str, Any], format: str, says: str) -> None:
    assert says in _refusal(as_json_lines([row]), format=format).violations[0].description


def test_a_long_line_is_refused_without_being_held_and_nothing_after_it_is_read() -> None:
    limits = FileLimits(max_row_bytes=100)
    refusal = _refusal(as_json_lines([TEXT, {"text": "a" * 1000}, {"txt": 1}]), limits=limits)
    assert [violation.field for violation in refusal.violations] == ["line 2"]
    assert "longer than 100 bytes" in refusal.violations[0].description
    assert refusal.details["num_bad_lines"] == "1"


def test_a_row_that_grows_as_canonical_json_is_refused_too() -> None:
    limits = FileLimits(max_row_bytes=100)
    data = b"text\n" + b"\x01" * 90 + b"\n"
    assert "longer than 100 bytes as JSON" in _refusal(data, limits=limits).message


def test_too_many_rows_are_refused() -> None:
    with pytest.raises(ResourceExhausted, match="more than 2 rows"):
        read_file(as_json_lines([TEXT] * 3), limits=FileLimits(max_rows=2))


@pytest.mark.parametrize("gap", [1, 2, 7])
def test_the_first_hundred_bad_rows_are_all_named_within_what_an_error_can_carry(gap: int) -> None:
    good = b'{"text": "a"}\n'
    refusal = _refusal(good + (b'{"text": 1}\n' + good * (gap - 1)) * 250)
    assert refusal.details["num_bad_lines"] == "250"
    named = set()
    for violation in refusal.violations:
        text = violation.field.removeprefix("line ")
        for part in violation.description.removeprefix("also bad: ").split(", ") if text == "lines" else [text]:
            first, _, last = part.partition("-")
            named |= set(range(int(first), int(last or first) + 1))
    bad_lines = {2 + gap * number for number in range(100)}
    assert named == bad_lines
    trailer = dict(trailing_metadata(refusal, request_id="r"))["grpc-status-details-bin"]
    # In base 64, beside a message that is escaped: what gRPC's 8 KiB leave.
    assert len(trailer) * 4 / 3 < 6 * 1024
    status = status_pb2.Status.FromString(trailer)
    carried = error_details_pb2.BadRequest()
    assert any(detail.Unpack(carried) for detail in status.details)
    assert [violation.field for violation in carried.field_violations] == [v.field for v in refusal.violations]


def test_formats_that_are_not_known_or_not_met() -> None:
    assert _refusal(as_json_lines([TEXT]), format="parquet").reason == "DATASET_FORMAT_UNKNOWN"
    assert _refusal(as_json_lines([{"a": "b"}])).reason == "DATASET_FORMAT_UNKNOWN"
    assert _refusal(as_json_lines([TEXT]), format="chat-messages").reason == "DATASET_MALFORMED"
    assert "several formats" in _refusal(as_json_lines([{**TEXT, **PAIR}])).message
    assert read_file(as_json_lines([{**TEXT, **PAIR}]), format="text").summary.format == "text"


def test_statistics_count_characters_and_rows_that_are_equal() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "", "completion": "a"},
        {"completion": "a", "prompt": ""},
        {"prompt": "ab", "completion": "cdé"},
        {"prompt": "", "completion": "a", "id": 7},
    ]
    statistics = read_file(as_json_lines(rows)).summary.statistics
    assert statistics.num_duplicates == 1
    assert statistics.total_characters == 8
    assert statistics.characters == (
        HistogramBucket(minimum=1, count=3),
        HistogramBucket(minimum=2, count=0),
        HistogramBucket(minimum=4, count=1),
    )
    chat = read_file(as_json_lines([TOOLS])).summary.statistics
    assert chat.total_characters == len("You add." + "1 + 2?" + "add" + "3" + "3")


def test_duplicates_are_compared_in_bounded_memory() -> None:
    seen = DigestSet(max_digests=1000)
    digests = [number.to_bytes(DIGEST_BYTES, "big") for number in range(1, 3001)]
    assert all(seen.add(digest) for digest in digests)
    assert not any(seen.add(digest) for digest in digests[:1000])
    assert all(seen.add(digest) for digest in digests[1000:])
    assert seen.memory_bytes <= 4 * 1000 * DIGEST_BYTES
    rows = [{"text": str(number % 10)} for number in range(50)]
    assert read_file(as_json_lines(rows)).summary.statistics.num_duplicates == 40
    capped = read_file(as_json_lines(rows), limits=FileLimits(max_compared_rows=4)).summary.statistics
    assert capped.num_duplicates == 4 * 4


def test_a_preview_ends_before_it_is_large() -> None:
    data = as_json_lines([{"text": "a" * 3 * 1024**2}] * 3)
    assert len(preview_rows(io.BytesIO(data), num_rows=3)) == 1
    assert json.loads(preview_rows(io.BytesIO(data), num_rows=3)[0].json)["text"][:3] == "aaa"
