"""Files of datasets: every format in every compression, how each is told by its bytes, where its troubles are."""

from __future__ import annotations

import bz2
import datetime
import io
import json
from decimal import Decimal
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from control_service.adapters.files.detection import detect_format
from control_service.adapters.files.reader import DatasetFileReader
from control_service.domain.dataset_files import FileLimits
from control_service.domain.errors import InvalidArgument, ResourceExhausted
from tests.fakes.dataset_files import (
    COMPRESSIONS,
    FORMATS,
    as_json_lines,
    as_json_object,
    as_parquet,
    open_parquet_here,
    read_file,
)

PAIRS = [{"prompt": f"q{number}", "completion": f'a, "{number}"\nü'} for number in range(5)]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def _refusal(data: bytes, format: str = "", limits: FileLimits | None = None) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as refused:
        read_file(data, format=format, limits=limits)
    return refused.value


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("file_format", FORMATS)
def test_the_same_rows_come_out_of_every_format_and_compression(file_format: str, compression: str) -> None:
    read = read_file(COMPRESSIONS[compression](FORMATS[file_format](PAIRS)))
    assert (read.file_format, read.compression) == (file_format, compression)
    assert read.rows == PAIRS
    assert (read.summary.format, read.summary.num_examples) == ("prompt-completion", 5)


@pytest.mark.parametrize("file_format", FORMATS)
def test_conversations_come_out_of_every_format(file_format: str) -> None:
    row = {"messages": TURNS, "tools": [{"type": "function"}]}
    read = read_file(FORMATS[file_format]([row, row]))
    assert read.rows == [row, row]
    assert read.summary.statistics.num_duplicates == 1


def test_an_object_around_the_rows_is_json_and_a_row_is_not() -> None:
    assert read_file(as_json_object(PAIRS)).rows == PAIRS
    for text, wanted in (
        (b'{"data": [', "json"),
        (b'{"version": 1,\n "rows": [\n', "json"),
        (b'{"messages": [{"role": "user"', "jsonl"),
        (b'{"text": "a", "tags": ["b"]}', "jsonl"),
        (b'{"ids": [1, 2, 3, ', "jsonl"),
        (b'{"rows": [ \n {', "json"),
        (b'{"tags": ["b"], "text": "a"}\n{"tags": []', "jsonl"),
        (b'{"text": "{\\"data\\": ["}', "jsonl"),
        (b'  \n[{"text"', "json"),
        (b"\xef\xbb\xbf[", "json"),
        (b"\xef\xbb\xbftext\n", "csv"),
        (b"PAR1....", "parquet"),
    ):
        assert detect_format(text) == wanted, text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff\xfet\x00e\x00x\x00t\x00", "UTF-16"),
        (b"\x00\x00\xfe\xff", "UTF-32"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "neither JSON, CSV nor Parquet"),
        (bz2.compress(bz2.compress(b'{"text": "a"}\n') + b"\x00"), "neither JSON, CSV nor Parquet"),
        (b"garbage\nrow\n", "the columns (garbage) are those of no known shape"),
        (b"prompt;completion\na;b\n", "prompt;completion"),
    ],
)
def test_a_file_of_no_known_format_is_said_to_be_that(data: bytes, says: str) -> None:
    refusal = _refusal(data)
    assert refusal.reason == "DATASET_FORMAT_UNKNOWN"
    assert says in refusal.message


def test_json_is_read_over_many_windows_of_text() -> None:
    rows = [{"text": "é😀\\" * number, "n": [[number]]} for number in range(1, 400)]
    text = json.dumps({"a": {"b": 1}, "rows": rows, "z": "end"}, ensure_ascii=False, indent=2).encode()
    assert len(text) > 3 * 65536
    assert read_file(text).rows == rows


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        (b'[{"text": "a"},\n {"text": }]', "line 2, row 2, column 11", "not JSON"),
        (b'[{"text": "a"},\n {"text": "b"]', "line 2, row 2, column 14", "not JSON"),
        (b'[{"text": "a"}\n {"text": "b"}]', "line 2, row 2, column 2", "',' or ']'"),
        (b'[{"text": "a"},\n', "line 2, row 2, column 1", "ends too early"),
        (b'[{"text": "a"},]', "line 1, row 2, column 16", "not JSON"),
        (b'[{"text": "a"}] {}', "line 1, row 2, column 17", "after its end"),
        (b'[{"text": "a"},\n\n 7]', "line 3, row 2", "not a JSON object"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "line 1, row 1, column 27", "not UTF-8"),
        (b'[{"text": "a"}, {"text": "b", "text": "c"}]', "line 1, row 2", "twice"),
        (b'{"data": [{"text": "a"}], "more": []}', "line 1, row 2, column 35", "several arrays ('data' and 'more')"),
        (b'{"data": [{"text": "a"}], 3: 4}', "line 1, row 2, column 27", "a name in quotes"),
        (b'[{"text": "a"}, {"text": "b", "x": ' + b"[" * 5000, "line 1, row 2, column 17", "nested deeper"),
    ],
)
def test_troubles_of_json_have_line_row_and_column(text: bytes, place: str, says: str) -> None:
    refusal = _refusal(text)
    assert [violation.field for violation in refusal.violations] == [place]
    assert says in refusal.message
    assert refusal.details["file_format"] == "json"


def test_rows_after_a_bad_one_are_still_read_where_the_syntax_is_whole() -> None:
    refusal = _refusal(b'[{"text": 1}, {"text": "a"}, {"txt": "b"}]')
    assert [violation.field for violation in refusal.violations] == ["line 1, row 1", "line 1, row 3"]


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        (b'prompt,completion\na,b\n"c,d\n', "line 3", "not CSV"),
        (b"prompt,completion\na\n", "line 2", "has 1 fields; the header row names 2 columns"),
        (b'prompt,completion\n"a\nb",c\nd,\n', "line 4, column completion", "'completion' is empty"),
        (b"prompt,completion\na,\xff\nc,d\n", "line 2", "not UTF-8 at byte 3"),
        (b'prompt,completion\n"a\n\xff\nb",c\ne,f\n', "line 3", "not UTF-8 at byte 1"),
        (b'prompt,completion\n"a"b,c\n', "line 2", "not CSV"),
        (b"prompt,prompt,completion\na,b,c\n", "line 1, column prompt", "names the column 'prompt' twice"),
        (b"prompt,,completion\na,b,c\n", "line 1", "a column without a name"),
        (b'messages\n"[{]"\n', "line 2, column messages", "not JSON"),
        (b"messages\n[]\n", "line 2, column messages", "'messages' is empty"),
    ],
)
def test_troubles_of_csv_have_line_and_column(text: bytes, place: str, says: str) -> None:
    refusal = _refusal(text)
    assert refusal.violations[0].field == place
    assert says in refusal.message
    assert refusal.details["file_format"] == "csv"


def test_csv_with_a_mark_windows_line_ends_blank_lines_and_empty_optional_cells() -> None:
    read = read_file(b"\xef\xbb\xbfinstruction,input,output\r\n\r\na,,b\r\n")
    assert read.rows == [{"instruction": "a", "input": "", "output": "b"}]
    assert read_file(b'messages,tools\n"' + json.dumps(TURNS).replace('"', '""').encode() + b'",\n').rows == [
        {"messages": TURNS}
    ]


def test_a_quote_that_never_ends_is_refused_when_a_row_is_too_long() -> None:
    refusal = _refusal(b'text\n"' + b"a\n" * 1000, limits=FileLimits(max_row_bytes=200))
    assert refusal.violations[0].field == "line 2"
    assert "a quote may be open" in refusal.message


def test_a_table_with_too_many_columns_is_refused() -> None:
    limits = FileLimits(max_columns=3)
    assert "at most 3" in _refusal(b"text,a,b,c\n1,2,3,4\n", limits=limits).message
    assert "at most 3" in _refusal(as_parquet([{"text": "a", "b": 1, "c": 2, "d": 3}]), limits=limits).message


def test_a_table_that_is_nested_too_deeply_is_refused() -> None:
    value: Any = "a"
    for _ in range(32):
        value = [value]
    assert "nested deeper than 32" in _refusal(as_parquet([{"text": "a", "x": value}])).message
    assert read_file(as_parquet([{"text": "a", "x": value[0]}])).summary.num_examples == 1


def test_parquet_gives_rows_by_number_leaves_out_nulls_and_what_json_cannot_hold() -> None:
    rows: list[dict[str, Any]] = [
        {
            "messages": [TURNS[0], {**TURNS[1], "tool_calls": None}],
            "id": 7,
            "when": datetime.date(2026, 1, 2),
            "price": Decimal("1.50"),
            "picture": b"\x00\x01",
            "tools": None,
        }
    ]
    assert read_file(as_parquet(rows)).rows == [{"messages": TURNS, "id": 7, "when": "2026-01-02", "price": "1.50"}]
    refusal = _refusal(as_parquet([{"text": "a"}, {"text": "b"}, {"text": ""}]))
    assert [violation.field for violation in refusal.violations] == ["row 3, column text"]
    assert "column is of type binary" in _refusal(as_parquet([{"text": b"a"}])).message
    assert "not finite" in _refusal(as_parquet([{"text": "a", "score": float("nan")}])).message


def test_a_large_text_that_a_table_repeats_is_not_multiplied_in_memory() -> None:
    import pyarrow

    data = as_parquet([{"text": "a" * 300_000, "turns": [{"x": "b" * 300_000}]}] * 100, row_group_size=100)
    assert len(data) < 1_000_000
    before = pyarrow.total_allocated_bytes()
    reader = DatasetFileReader(limits=FileLimits(), spool_directory=Path(), open_parquet=open_parquet_here)
    with reader.open(io.BytesIO(data), size_bytes=len(data), unwanted=Event()) as file:
        for row, _ in zip(file.rows, range(70), strict=False):
            assert row.content is not None
            assert pyarrow.total_allocated_bytes() - before < 10_000_000


def test_columns_whose_dictionaries_overflow_are_read_whole() -> None:
    rows = [
        {"messages": [{**TURNS[0], "content": f"{number} " * 20}, TURNS[1]], "meta": {"from": f"{number:09}" * 9}}
        for number in range(300)
    ]
    data = as_parquet(rows, row_group_size=101, dictionary_pagesize_limit=2000, data_page_size=1000)
    assert read_file(data).rows == rows


def test_damaged_files_are_refused() -> None:
    whole = as_parquet(PAIRS)
    for data in (whole[:-20], whole[:4] + b"\x00" * 400 + whole[404:], b"PAR1" + b"x" * 50 + b"PAR1"):
        refusal = _refusal(data)
        assert (refusal.reason, refusal.details["file_format"]) == ("DATASET_MALFORMED", "parquet")
    for name, compress in COMPRESSIONS.items():
        if name:
            packed = compress(as_json_lines(PAIRS * 100))
            assert f"decompressed as {name}" in _refusal(packed[:-10]).message
            assert "cannot be decompressed" in _refusal(packed + b"garbage that is no member").message


def test_members_of_a_compressed_file_follow_each_other() -> None:
    for name, compress in COMPRESSIONS.items():
        if name:
            data = compress(as_json_lines(PAIRS[:2])) + compress(as_json_lines(PAIRS[2:]))
            assert read_file(data).rows == PAIRS, name


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name])
def test_a_file_that_becomes_far_larger_than_it_is_is_refused(compression: str) -> None:
    limits = FileLimits(max_ratio=10, ratio_floor_bytes=100_000)
    bomb = COMPRESSIONS[compression](b'{"text": "' + b"a" * 2_000_000 + b'"}\n')
    with pytest.raises(ResourceExhausted) as refused:
        read_file(bomb, limits=limits)
    assert refused.value.reason == "TOO_LARGE"
    packed = COMPRESSIONS[compression](as_parquet([{"text": "a" * 2_000_000}]) + b"\x00" * 2_000_000)
    with pytest.raises((ResourceExhausted, InvalidArgument)):
        read_file(packed, limits=limits)


def test_a_parquet_file_that_says_it_becomes_far_larger_is_refused() -> None:
    data = as_parquet([{"text": f"{number:05}" + "a" * 5000} for number in range(400)], row_group_size=400)
    with pytest.raises(ResourceExhausted) as refused:
        read_file(data, limits=FileLimits(max_ratio=2, ratio_floor_bytes=1000))
    assert "parquet file becomes" in refused.value.message


def test_an_import_of_the_reader_costs_no_parquet() -> None:
    import subprocess
    import sys

    code = "import control_service.adapters.files.reader, sys; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reading_stops_where_the_caller_stops() -> None:
    stream = io.BytesIO(as_json_lines([{"text": "a" * 1000}] * 10_000))
    from control_service.adapters.files import json_lines

    rows = json_lines.read(stream, FileLimits())
    assert next(rows).content == {"text": "a" * 1000}
    assert stream.tell() < 100_000
