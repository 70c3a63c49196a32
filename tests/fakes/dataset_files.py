"""Files of datasets for tests: made in memory in every format and compression, and read as registration reads them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, cast

from control_service.adapters.files.reader import DatasetFileReader
from control_service.domain.dataset_files import FileLimits
from control_service.domain.dataset_rows import RowSummary, read_rows

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a file gave."""

    file_format: str
    compression: str
    summary: RowSummary
    rows: list[Any]


@contextmanager
def open_parquet_here(stream: BinaryIO, limits: FileLimits, size_bytes: int, unwanted: Event) -> Iterator[Any]:
    """Reads Parquet in this process: quicker, and what the reading process does inside."""
    from control_service.adapters.files import parquet_table

    yield parquet_table.open_table(stream, limits, size_bytes)


def read_file(data: bytes | BinaryIO, *, format: str = "", limits: FileLimits | None = None, size: int = 0) -> Read:
    """Reads a file to its end in this process; raises what registration raises."""
    limits = limits or FileLimits()
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    stored: list[bytes] = []
    directory = Path(tempfile.gettempdir())
    reader = DatasetFileReader(limits=limits, spool_directory=directory, open_parquet=open_parquet_here)
    size = len(data) if isinstance(data, bytes) else size
    with reader.open(stream, size_bytes=size, unwanted=Event()) as file:
        summary = read_rows(file, format=format, limits=limits, store=stored.append)
    return Read(
        file_format=file.file_format,
        compression=file.compression,
        summary=summary,
        rows=[json.loads(line) for line in stored],
    )


def as_json_lines(rows: Iterable[Row]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_json(rows: Iterable[Row]) -> bytes:
    return json.dumps(list(rows), indent=1).encode()


def as_json_object(rows: Iterable[Row]) -> bytes:
    return json.dumps({"version": 1, "data": list(rows), "note": {"rows": 2}}).encode()


def as_csv(rows: Iterable[Row]) -> bytes:
    listed = [
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()} for row in rows
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in listed for name in row)))
    writer.writeheader()
    writer.writerows(listed)
    return text.getvalue().encode()


def as_parquet(rows: Iterable[Row], *, row_group_size: int = 2, **options: Any) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    table = pyarrow.Table.from_pylist([dict(row) for row in rows])
    pyarrow.parquet.write_table(table, file, row_group_size=row_group_size, **options)
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    import pyarrow

    return cast("bytes", pyarrow.compress(data, codec="zstd", asbytes=True))


FORMATS: Mapping[str, Callable[[Iterable[Row]], bytes]] = {
    "jsonl": as_json_lines,
    "json": as_json,
    "csv": as_csv,
    "parquet": as_parquet,
}
COMPRESSIONS: Mapping[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd,
}
