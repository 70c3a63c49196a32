"""Whatever a file holds, reading it ends in rows or in a typed error, within bounded memory."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable
from threading import Event
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from control_service.adapters.files import json_array
from control_service.adapters.files.reader import DatasetFileReader
from control_service.domain.dataset_files import FileLimits
from control_service.domain.dataset_rows import read_rows
from control_service.domain.errors import InvalidArgument, ResourceExhausted
from tests.fakes.dataset_files import COMPRESSIONS, FORMATS, Read, as_json_lines, read_file

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
SMALL = FileLimits(max_row_bytes=4096, ratio_floor_bytes=1 << 20, max_ratio=50, max_columns=20, max_rows=500)
ROWS = [{"prompt": f"q{number}é", "completion": 'a,"b"\n' * number} for number in range(1, 6)]
MEBIBYTE = 1 << 20

MAGICS = [b"", b"{", b"[", b"PAR1", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf"]
WORDS = [b'{"text": "', b'"}\n', b'"', b"\\ud800", b"\xed\xa0\x80", b"\xff", b"NaN", b"[", b"]", b"{", b"}", b",", b":"]
WORDS += [b"\n", b"\r\n", b"\xef\xbb\xbf", b"\x00", b"\\u0000", b"1e999", b"null", b'"messages"', b"text,", b"prompt"]


def outcome(data: bytes, format: str = "") -> Read | InvalidArgument | ResourceExhausted:
    """Rows or a typed error, with a place where there is one; anything else fails the test."""
    found: InvalidArgument | ResourceExhausted
    try:
        return read_file(data, format=format, limits=SMALL)
    except (InvalidArgument, ResourceExhausted) as error:
        found = error
    assert found.reason in ("TOO_LARGE", "DATASET_MALFORMED", "DATASET_EMPTY", "DATASET_FORMAT_UNKNOWN")
    assert found.message.encode()
    if found.reason == "DATASET_MALFORMED":
        assert found.violations
        assert found.details["file_format"]
        assert found.details.keys() & {"line", "row"}
    return found


@QUICK
@given(st.sampled_from(MAGICS), st.lists(st.one_of(st.sampled_from(WORDS), st.binary(max_size=20)), max_size=30))
def test_any_bytes(magic: bytes, parts: list[bytes]) -> None:
    outcome(magic + b"".join(parts))


@QUICK
@given(st.data(), st.sampled_from(sorted(FORMATS)), st.sampled_from(sorted(COMPRESSIONS)))
def test_damaged_files(data: st.DataObject, file_format: str, compression: str) -> None:
    content = bytearray(COMPRESSIONS[compression](FORMATS[file_format](ROWS)))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = min(len(content), start + data.draw(st.integers(0, 8)))
        content[start:end] = data.draw(st.binary(max_size=8))
    found = outcome(bytes(content))
    if isinstance(found, Read):
        assert all(isinstance(row["completion"], str) for row in found.rows)


@QUICK
@given(st.data(), st.sampled_from(sorted(FORMATS)), st.sampled_from(sorted(COMPRESSIONS)))
def test_files_that_end_too_early(data: st.DataObject, file_format: str, compression: str) -> None:
    content = COMPRESSIONS[compression](FORMATS[file_format](ROWS))
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    found = outcome(cut)
    if isinstance(found, Read):
        # Only what is made of lines may lose its last ones unseen.
        assert found.file_format in ("jsonl", "csv")
        assert len(found.rows) <= len(ROWS)


# No NUL: a text that has one is taken for no text.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=30)


@QUICK
@given(st.lists(st.fixed_dictionaries({"prompt": TEXTS, "completion": TEXTS}), min_size=1, max_size=5))
def test_every_text_comes_out_of_every_format_as_it_went_in(rows: list[dict[str, str]]) -> None:
    for file_format, make in FORMATS.items():
        found = outcome(make(rows))
        assert isinstance(found, Read), (file_format, found)
        assert found.rows == rows, file_format


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=12,
)


@QUICK
@given(st.lists(VALUES, max_size=6), st.integers(1, 9), st.sampled_from([None, 0, 2]), st.booleans())
def test_json_is_read_the_same_whatever_the_window(
    values: list[Any], piece: int, indent: int | None, ensure_ascii: bool
) -> None:
    try:
        text = json.dumps({"a": [1, [2]][0], "rows": values, "z": {"y": [3]}}, indent=indent, ensure_ascii=ensure_ascii)
        data = text.encode()
    except UnicodeEncodeError:
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_array, "_PIECE_BYTES", piece)
        found = list(json_array.read(io.BytesIO(data), FileLimits()))
    expected = json.loads(data)["rows"]
    assert [row.content for row in found] == [value if isinstance(value, dict) else None for value in expected]
    assert [row.number for row in found] == list(range(1, len(values) + 1))


@QUICK
@given(
    st.lists(st.sampled_from([b"[", b"{", b'"a":', b"]", b"}", b",", b"1", b'"']), max_size=60), st.integers(1, 5000)
)
def test_deep_and_crooked_json(parts: list[bytes], repeats: int) -> None:
    text = b"".join(parts)
    for data in (
        b"[" + text * repeats,
        b'{"text": "a", "x": ' + text * repeats + b"}\n",
        b'messages\n"' + text + b'"\n',
    ):
        assert isinstance(outcome(data), InvalidArgument | ResourceExhausted | Read)


class Endless(io.RawIOBase):
    """A file of a gigabyte that is never held: a beginning, then one byte for ever; counts what was read of it."""

    def __init__(self, beginning: bytes, filling: bytes, *, size_bytes: int = 1 << 30) -> None:
        self._beginning = beginning
        self._filling = filling
        self._size_bytes = size_bytes
        self._at = 0
        self.num_bytes = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = {0: 0, 1: self._at, 2: self._size_bytes}[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._size_bytes - self._at)
        head = self._beginning[self._at : self._at + size]
        data = head + self._filling * (size - len(head))
        buffer[:size] = data
        self._at += size
        self.num_bytes += size
        return size


@pytest.mark.parametrize(
    ("beginning", "filling"),
    [
        (b'{"text": "', b"a"),
        (b'{"text": "b"}\n{"text": "', b"a"),
        (b'[{"text": "', b"a"),
        (b'{"data": [{"text": "', b"a"),
        (b'{"data": [{"text": "', b'"'),
        (b"[", b"["),
        (b"[", b" "),
        (b'text\n"', b"a"),
        (b'text\n"', b"\n"),
        (b"text", b"a"),
        (b"a", b","),
        (b'{"text": "b"}\n', b"["),
    ],
)
def test_a_line_of_a_gigabyte_is_refused_after_a_row_s_worth_of_bytes(beginning: bytes, filling: bytes) -> None:
    limits = FileLimits(max_row_bytes=MEBIBYTE // 4)
    endless = Endless(beginning, filling, size_bytes=1 << 30 if filling != b" " else 8 * MEBIBYTE)
    stream = cast("BinaryIO", io.BufferedReader(endless, 1 << 16))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument) as refused:
            read_file(stream, limits=limits, size=1 << 30)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.reason in ("DATASET_MALFORMED", "DATASET_FORMAT_UNKNOWN")
    assert endless.num_bytes < 10 * MEBIBYTE
    assert peak < 8 * MEBIBYTE


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name])
@pytest.mark.parametrize(
    "make", [lambda data: b'{"text": "' + data, lambda data: b"[" + data, lambda data: b"PAR1" + data]
)
def test_a_zip_bomb_is_refused_in_bounded_memory(compression: str, make: Callable[[bytes], bytes]) -> None:
    limits = FileLimits(max_row_bytes=64 * MEBIBYTE, ratio_floor_bytes=MEBIBYTE, max_ratio=20)
    bomb = COMPRESSIONS[compression](make(b" " * (24 * MEBIBYTE)))
    tracemalloc.start()
    try:
        with pytest.raises(ResourceExhausted):
            read_file(bomb, limits=limits)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * MEBIBYTE


def test_a_large_file_is_read_in_bounded_memory() -> None:
    rows = [{"prompt": "q" * 500, "completion": str(number)} for number in range(1500)]
    for file_format in ("jsonl", "json", "csv"):
        data = FORMATS[file_format](rows)
        tracemalloc.start()
        try:
            reader = DatasetFileReader(limits=FileLimits(), spool_directory=cast("Any", None))
            with reader.open(io.BytesIO(data), size_bytes=len(data), unwanted=Event()) as file:
                assert read_rows(file, limits=FileLimits()).num_examples == 1500
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < len(data), file_format


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        (b'{"text": "%s"', ["jsonl"]),
        (b'{"text": "\xff%s"}', ["jsonl"]),
        (b'{"txt": "%s"}', ["jsonl", "json"]),
        (b'{"text": "a", "text": "%s"}', ["jsonl", "json"]),
        (b'{"text": ["%s"]}', ["jsonl", "json"]),
    ],
)
def test_bad_rows_are_not_held(row: bytes, kinds: list[str]) -> None:
    """What is remembered of bad rows are their places, and not the rows."""
    rows = [row.replace(b"%s", b"%d" % number + b"a" * (MEBIBYTE // 8)) for number in range(120)]
    for kind in kinds:
        data = b"\n".join(rows) if kind == "jsonl" else b"[" + b",".join(rows) + b"]"
        tracemalloc.start()
        try:
            with pytest.raises(InvalidArgument) as refused:
                read_file(data, format="text")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert refused.value.details["num_bad_lines"] == "120"
        assert peak < 4 * MEBIBYTE


def test_lone_surrogates_and_marks_inside_of_a_file() -> None:
    for content in (
        b'{"text": "\\ud83d"}\n',
        b'{"text": "\xed\xa0\xbd"}\n',
        b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n',
    ):
        assert isinstance(outcome(content), InvalidArgument)
    pair = outcome(b'{"text": "\\ud83d\\ude00"}\n')
    assert isinstance(pair, Read)
    assert pair.rows == [{"text": "😀"}]
    assert isinstance(outcome(b"\xef\xbb\xbf" + as_json_lines([{"text": "a"}])), Read)
