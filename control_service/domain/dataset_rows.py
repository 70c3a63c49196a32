"""Checks every row of an opened file and counts them, in bounded memory; says which rows are not valid, where and why.

Knows no file format and no byte of one: readers give rows. What is refused is refused, never repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from control_service.domain.bad_rows import BadRows
from control_service.domain.dataset import DatasetRow, DatasetStatistics
from control_service.domain.dataset_files import FileLimits, OpenedFile, SourceRow, Trouble
from control_service.domain.errors import FieldViolation, InvalidArgument, ResourceExhausted
from control_service.domain.json_text import canonical_bytes
from control_service.domain.row_shapes import KEYS, SHAPES, UnknownShape, check_row, detect_format
from control_service.domain.row_statistics import RowCounter

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A preview ends early rather than hold more than this.
MAX_PREVIEW_BYTES = 4 * 1024**2


@dataclass(frozen=True, kw_only=True)
class RowSummary:
    """What a valid file holds."""

    format: str
    num_examples: int
    statistics: DatasetStatistics


def check_format(format: str) -> None:
    """InvalidArgument DATASET_FORMAT_UNKNOWN for an id that is none; empty means: find it."""
    if format and format not in KEYS:
        raise InvalidArgument(
            "DATASET_FORMAT_UNKNOWN",
            f"format {format!r} is not known; known are {', '.join(KEYS)}",
            violations=(FieldViolation("format", "is not known"),),
        )


def read_rows(
    file: OpenedFile, *, format: str = "", limits: FileLimits, store: Callable[[bytes], None] | None = None
) -> RowSummary:
    """Reads every row. `format` empty: the shape of the first good row. `store` is given each good row as canonical
    JSON with its line end.

    InvalidArgument DATASET_EMPTY; DATASET_FORMAT_UNKNOWN; DATASET_MALFORMED with the first 100 bad rows.
    ResourceExhausted TOO_LARGE.
    """
    check_format(format)
    bad = BadRows(file_format=file.file_format)
    if file.columns and not format:
        format = _format_of_table(file)
    counter = RowCounter(max_compared_rows=limits.max_compared_rows)
    num_examples = 0
    for row in _until_trouble(file.rows, bad):
        if row.number > limits.max_rows:
            raise ResourceExhausted(
                "TOO_LARGE", f"more than {limits.max_rows} rows", details={"max_rows": str(limits.max_rows)}
            )
        try:
            if row.trouble is not None:
                raise row.trouble
            content = row.content or {}
            format = format or detect_format(content)
            num_characters = check_row(content, format)
            canonical = canonical_bytes(content)
            if len(canonical) > limits.max_row_bytes:
                raise Trouble(f"is longer than {limits.max_row_bytes} bytes as JSON")
            counter.add(canonical=canonical_bytes(content, sort_keys=True), num_characters=num_characters)
            if store is not None:
                store(canonical + b"\n")
            num_examples += 1
        except Trouble as trouble:
            bad.add(row, trouble)
    if bad.num_bad:
        raise bad.refusal(is_unknown_shape=not format and bad.first_is(UnknownShape))
    if not num_examples:
        raise InvalidArgument("DATASET_EMPTY", "the dataset has no example", details={"file_format": file.file_format})
    return RowSummary(format=format, num_examples=num_examples, statistics=counter.statistics())


def preview_rows(stream: BinaryIO, *, num_rows: int) -> tuple[DatasetRow, ...]:
    """The first rows of stored JSON lines, as they are; fewer when they are large."""
    rows: list[DatasetRow] = []
    held_bytes = 0
    for line, raw in enumerate(stream, start=1):
        text = raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw
        if not text.strip():
            continue
        held_bytes += len(text)
        if len(rows) == num_rows or (rows and held_bytes > MAX_PREVIEW_BYTES):
            break
        rows.append(DatasetRow(line=line, json=text.decode().strip()))
    return tuple(rows)


def _format_of_table(file: OpenedFile) -> str:
    try:
        return detect_format(file.columns)
    except Trouble as trouble:
        columns = ", ".join(file.columns)
        more = f"; known shapes are {SHAPES}" if isinstance(trouble, UnknownShape) else ""
        message = trouble.message if not more else "are those of no known shape"
        raise InvalidArgument(
            "DATASET_FORMAT_UNKNOWN",
            f"{file.file_format}: the columns ({columns[:128]}) {message.removeprefix('has ')}{more}",
            details={"file_format": file.file_format, "line": "1"},
            violations=(FieldViolation("columns", columns[:128]),),
        ) from trouble


def _until_trouble(rows: Iterator[SourceRow], bad: BadRows) -> Iterator[SourceRow]:
    """The rows, up to where the file cannot be read any further."""
    number = 0
    try:
        for row in rows:
            number = row.number
            yield row
    except Trouble as trouble:
        bad.add(SourceRow(number=number + 1, line=trouble.line), trouble)
