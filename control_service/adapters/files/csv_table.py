"""Reads CSV as RFC 4180 has it: commas, double quotes, a header row of names. Guesses no other dialect."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Final

from control_service.adapters.files.detection import BYTE_ORDER_MARK
from control_service.domain.dataset_files import FileLimits, SourceRow, Trouble
from control_service.domain.json_text import JsonParser

# Columns that hold JSON, since a cell holds nothing but text.
JSON_COLUMNS: Final = frozenset({"messages", "conversations", "tools"})
# One for the process, and no limit of ours: `_Lines` ends a record that is too long before it is held.
csv.field_size_limit(2**31 - 1)


def open_table(stream: BinaryIO, limits: FileLimits) -> tuple[tuple[str, ...], Iterator[SourceRow]]:
    """(columns, rows). Trouble for a header that cannot be used."""
    lines = _Lines(stream, limits)
    reader = csv.reader(lines, strict=True)
    header = _header(reader, lines, limits)
    return header, _rows(reader, lines, header, limits)


def _header(reader: Iterator[list[str]], lines: _Lines, limits: FileLimits) -> tuple[str, ...]:
    try:
        header = next((fields for fields in reader if fields), [])
    except csv.Error as error:
        raise Trouble(f"is not CSV: {error}", line=lines.number) from error
    if lines.trouble is not None:
        raise lines.trouble
    if len(header) > limits.max_columns:
        raise Trouble(f"has {len(header)} columns; at most {limits.max_columns} are read", line=1)
    for column in header:
        if not column or header.count(column) > 1:
            what = f"names the column {column[:32]!r} twice" if column else "has a column without a name"
            raise Trouble(f"the header row {what}", line=1, column=column[:32])
    return tuple(header)


def _rows(reader: Iterator[list[str]], lines: _Lines, header: Sequence[str], limits: FileLimits) -> Iterator[SourceRow]:
    parser = JsonParser(limits)
    number = 0
    while True:
        lines.begin_record()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            yield SourceRow(number=number, line=lines.first, trouble=Trouble(f"is not CSV: {error}", line=lines.number))
            continue
        if not fields:
            continue
        number += 1
        try:
            if lines.trouble is not None:
                raise lines.trouble
            yield SourceRow(number=number, line=lines.first, content=_content(header, fields, parser))
        except Trouble as trouble:
            yield SourceRow(number=number, line=lines.first, trouble=trouble)


def _content(header: Sequence[str], fields: Sequence[str], parser: JsonParser) -> dict[str, Any]:
    if len(fields) != len(header):
        raise Trouble(f"has {len(fields)} fields; the header row names {len(header)} columns")
    row: dict[str, Any] = dict(zip(header, fields, strict=True))
    for column in JSON_COLUMNS & row.keys():
        if column == "tools" and not row[column].strip():
            del row[column]
            continue
        try:
            row[column] = parser.parse_whole(row[column])
        except Trouble as trouble:
            where = f" (at its character {trouble.column})" if trouble.column else ""
            raise Trouble(f"{trouble.message}{where}", column=column) from trouble
    return row


class _Lines:
    """Lines of text for the csv module, counted; a record that is longer than a row may be ends the reading.

    Bytes that are no UTF-8 are the record's `trouble`: raised at once they would cut a field in two and make the lines
    after it wrong as well.
    """

    def __init__(self, stream: BinaryIO, limits: FileLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._record_bytes = 0
        self.number = 0
        self.first = 1
        self.trouble: Trouble | None = None

    def begin_record(self) -> None:
        """The next line is a record's first."""
        self._record_bytes = 0
        self.first = self.number + 1
        self.trouble = None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        most = self._limits.max_row_bytes
        raw = self._stream.readline(most + 1)
        if not raw:
            raise StopIteration
        self.number += 1
        self._record_bytes += len(raw)
        if self._record_bytes > most:
            why = "" if self.number == self.first else "; a quote may be open"
            raise Trouble(f"is longer than {most} bytes{why}", line=self.first)
        if self.number == 1:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.trouble = self.trouble or Trouble(f"is not UTF-8 at byte {error.start + 1}", line=self.number)
            return raw.decode(errors="replace")
