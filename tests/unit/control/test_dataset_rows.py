"""Rows of data set files: what is read, what is refused, and how the line is named."""

from __future__ import annotations

import io
import json

import pytest

from control_service.domain import dataset_rows
from control_service.domain.dataset_rows import preview_rows, read_dataset
from control_service.domain.errors import InvalidArgument

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
PAIR = {"prompt": "hi", "completion": "hello"}
TEXT = {"text": "hello"}


def _lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _refusal(data: bytes, format: str = "") -> InvalidArgument:
    with pytest.raises(InvalidArgument) as refused:
        read_dataset(io.BytesIO(data), format=format)
    return refused.value


@pytest.mark.parametrize(("row", "format"), [(CHAT, "chat-messages"), (PAIR, "prompt-completion"), (TEXT, "text")])
def test_formats_are_found_from_the_first_row(row: object, format: str) -> None:
    summary = read_dataset(io.BytesIO(_lines(row, row, row)))
    assert (summary.format, summary.num_examples) == (format, 3)


def test_blank_lines_windows_line_ends_and_a_missing_last_line_end_are_fine() -> None:
    data = b'\n{"text": "a"}\r\n\r\n   \n{"text": "b"}'
    assert read_dataset(io.BytesIO(data)).num_examples == 2
    assert [(row.line, row.json) for row in preview_rows(io.BytesIO(data), num_rows=9)] == [
        (2, '{"text": "a"}'),
        (5, '{"text": "b"}'),
    ]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"   "])
def test_an_empty_file(data: bytes) -> None:
    assert _refusal(data).reason == "DATASET_EMPTY"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "not JSON"),
        (b'{"text": "a"} trailing', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
        (b"[1]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b'{"text": 1}', "'text' is not a string"),
        (b'{"text": ""}', "'text' is empty"),
        (b'{"txt": "a"}', "has no 'text'"),
        (b'{"text": NaN}', "NaN is not a JSON number"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "a", "x": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper"),
        (b'{"text": ' + b"[" * 100_000, "nested deeper"),
    ],
)
def test_a_bad_line_is_named(line: bytes, says: str) -> None:
    refusal = _refusal(_lines(TEXT) + line + b"\n" + _lines(TEXT))
    assert refusal.reason == "DATASET_MALFORMED"
    assert [violation.field for violation in refusal.violations] == ["line 2"]
    assert says in refusal.violations[0].description
    assert refusal.details["line"] == "2"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": []}, "is empty"),
        ({"messages": "hi"}, "not a list"),
        ({"messages": [1]}, "messages[0]: is not an object"),
        ({"messages": [{"content": "a"}]}, "messages[0]: has no 'role'"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "role 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, "'content' is not a string"),
        ({"prompt": "a", "completion": "b"}, "has no 'messages'"),
    ],
)
def test_bad_chats(row: object, says: str) -> None:
    assert says in _refusal(_lines(CHAT, row)).violations[0].description


def test_a_byte_order_mark_is_refused_with_advice() -> None:
    assert "byte order mark" in _refusal(b"\xef\xbb\xbf" + _lines(TEXT)).message


def test_a_long_line_is_refused_without_being_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_rows, "MAX_LINE_BYTES", 100)
    refusal = _refusal(_lines(TEXT, {"text": "a" * 1000}, TEXT))
    assert refusal.violations[0].field == "line 2"
    assert "longer than 100 bytes" in refusal.violations[0].description
    assert refusal.details["num_bad_lines"] == "1"


def test_at_most_a_hundred_lines_are_named_but_all_are_counted() -> None:
    refusal = _refusal(_lines(TEXT) + b"{\n" * 250)
    assert len(refusal.violations) == 100
    assert refusal.details["num_bad_lines"] == "250"


def test_formats_that_are_not_known_or_not_met() -> None:
    assert _refusal(_lines(TEXT), format="parquet").reason == "DATASET_FORMAT_UNKNOWN"
    assert _refusal(_lines({"a": "b"})).reason == "DATASET_FORMAT_UNKNOWN"
    assert _refusal(_lines(TEXT), format="chat-messages").reason == "DATASET_MALFORMED"
    assert "several formats" in _refusal(_lines({**TEXT, **PAIR})).message
    assert read_dataset(io.BytesIO(_lines({**TEXT, **PAIR})), format="text").format == "text"
