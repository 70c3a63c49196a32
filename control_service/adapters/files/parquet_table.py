"""Reads Parquet by row groups, a few rows at a time. Reads no column that JSON cannot hold.

Columns of text stay references into their dictionaries until a row is made: a small file may repeat a large text a
million times, and would otherwise be that large in memory. Texts inside of lists and objects cannot be read so (Arrow
makes no nested array of several dictionaries, which a large column has), and are held for a few rows at a time.
"""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

import pyarrow
import pyarrow.parquet
from pyarrow import types

from control_service.domain.dataset_files import FileLimits, SourceRow, Trouble
from control_service.domain.errors import ResourceExhausted
from control_service.domain.row_shapes import KNOWN_KEYS

_BATCH_ROWS: Final = 16
_BUFFER_BYTES: Final = 256 * 1024
# What a footer may make the reader hold: names and counts are a file's own word.
_MAX_FOOTER_STRING_BYTES: Final = 16 * 1024**2
_MAX_FOOTER_ITEMS: Final = 1_000_000
# What the library raises over a damaged file: its own exceptions, and Python's over what it made of the bytes.
_DAMAGE: Final = (pyarrow.ArrowException, OSError, ValueError, LookupError, OverflowError)


def open_table(stream: BinaryIO, limits: FileLimits, size_bytes: int) -> tuple[tuple[str, ...], Iterator[SourceRow]]:
    """(columns, rows). Trouble for a file that is damaged or has columns that no row can have; ResourceExhausted
    TOO_LARGE for one whose footer says that it becomes too large."""
    try:
        file = pyarrow.parquet.ParquetFile(
            stream,
            pre_buffer=False,
            buffer_size=_BUFFER_BYTES,
            thrift_string_size_limit=_MAX_FOOTER_STRING_BYTES,
            thrift_container_size_limit=_MAX_FOOTER_ITEMS,
        )
        _check_size(file.metadata, limits, size_bytes)
        columns = _columns(file.schema_arrow, limits)
        texts = [
            leaf.path
            for leaf in (file.schema.column(index) for index in range(len(file.schema)))
            if leaf.physical_type == "BYTE_ARRAY" and "." not in leaf.path
        ]
        stream.seek(0)
        again = pyarrow.parquet.ParquetFile(
            stream, metadata=file.metadata, read_dictionary=texts, pre_buffer=False, buffer_size=_BUFFER_BYTES
        )
    except _DAMAGE as error:
        raise _damaged(error) from error
    return columns, _rows(again, columns)


def _rows(file: Any, columns: tuple[str, ...]) -> Iterator[SourceRow]:
    number = 0
    for batch in _batches(file, columns):
        values = {name: batch.column(name) for name in columns}
        for index in range(batch.num_rows):
            number += 1
            try:
                yield SourceRow(number=number, line=0, content=_content(values, index))
            except Trouble as trouble:
                yield SourceRow(number=number, line=0, trouble=trouble)


def _batches(file: Any, columns: tuple[str, ...]) -> Iterator[Any]:
    try:
        for group in range(file.num_row_groups):
            yield from file.iter_batches(
                batch_size=_BATCH_ROWS, row_groups=[group], columns=list(columns), use_threads=False
            )
    except _DAMAGE as error:
        raise _damaged(error) from error


def _content(values: dict[str, Any], index: int) -> dict[str, Any]:
    row = {}
    for name, column in values.items():
        try:
            value = _plain(column[index].as_py())
        except UnicodeDecodeError as error:
            raise Trouble("is not UTF-8", column=name) from error
        except _DAMAGE as error:
            raise Trouble(f"cannot be read: {_first_line(error)}", column=name) from error
        if value is not None:
            row[name] = value
    return row


def _plain(value: Any) -> Any:
    """The value as JSON has it. A member that is null is left out: in a table a row cannot go without it."""
    if isinstance(value, dict):
        return {name: plain for name, item in value.items() if (plain := _plain(item)) is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal) else value


def _columns(schema: Any, limits: FileLimits) -> tuple[str, ...]:
    """Names of the columns that are read."""
    if len(schema) > limits.max_columns:
        raise Trouble(f"has {len(schema)} columns; at most {limits.max_columns} are read")
    found = []
    for field in schema:
        if schema.names.count(field.name) > 1:
            raise Trouble("the file names a column twice", column=field.name[:32])
        if _depth(field.type) >= limits.max_depth:
            raise Trouble(f"a column is nested deeper than {limits.max_depth}", column=field.name[:32])
        if _is_plain(field.type):
            found.append(field.name)
        elif field.name in KNOWN_KEYS:
            raise Trouble(f"a column is of type {field.type}, which is no text", column=field.name)
    return tuple(found)


def _is_plain(type: Any) -> bool:
    if types.is_struct(type):
        return all(_is_plain(type.field(index).type) for index in range(type.num_fields))
    if _is_list(type) or types.is_dictionary(type):
        return _is_plain(type.value_type)
    return any(is_one(type) for is_one in _PLAIN)


def _is_list(type: Any) -> bool:
    return bool(types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type))


def _depth(type: Any) -> int:
    if types.is_struct(type):
        return 1 + max((_depth(type.field(index).type) for index in range(type.num_fields)), default=0)
    return 1 + _depth(type.value_type) if _is_list(type) else 0


_PLAIN: Final = (
    types.is_string,
    types.is_large_string,
    types.is_boolean,
    types.is_integer,
    types.is_floating,
    types.is_null,
    types.is_timestamp,
    types.is_date,
    types.is_time,
    types.is_decimal,
)


def _check_size(metadata: Any, limits: FileLimits, size_bytes: int) -> None:
    groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
    num_bytes = sum(group.total_byte_size for group in groups)
    if num_bytes > limits.decompressed_bytes(size_bytes):
        most = limits.decompressed_bytes(size_bytes)
        raise ResourceExhausted(
            "TOO_LARGE",
            f"the parquet file becomes {num_bytes} bytes; of one of its size at most {most} are taken",
            details={"max_bytes": str(most)},
        )


def _damaged(error: Exception) -> Trouble:
    return Trouble(f"the file cannot be read as Parquet: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
