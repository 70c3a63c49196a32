"""What a dataset's file gives, whatever its format: rows with their places, troubles with theirs, and the limits of
reading. Reads nothing itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Ids that stand in the contract.
JSON_LINES = "jsonl"
JSON = "json"
CSV = "csv"
PARQUET = "parquet"
FILE_FORMATS = (JSON_LINES, JSON, CSV, PARQUET)
COMPRESSIONS = ("gzip", "bzip2", "xz", "zstd")
# Formats whose rows have named columns, and no line or not only one of their own.
TABLES = frozenset({CSV, PARQUET})


@dataclass(frozen=True, kw_only=True)
class FileLimits:
    """How much a file may make the service read and hold."""

    # What a compressed file may become; and how many times its own size, once that is more than the floor.
    max_decompressed_bytes: int = 64 * 1024**3
    max_ratio: int = 200
    ratio_floor_bytes: int = 64 * 1024**2
    # A row as it stands in the file, and as canonical JSON.
    max_row_bytes: int = 8 * 1024**2
    max_depth: int = 32
    max_columns: int = 512
    max_rows: int = 100_000_000
    # Duplicates are looked for among the first of this many different rows; each takes at most 32 bytes of memory.
    max_compared_rows: int = 4 * 1024**2

    def decompressed_bytes(self, size_bytes: int) -> int:
        """What a compressed file of this size may become."""
        return min(self.max_decompressed_bytes, max(self.ratio_floor_bytes, self.max_ratio * size_bytes))


class Trouble(Exception):
    """What is wrong with one row; or, raised by a reader, with the file from there on.

    `line` counts from 1, 0 means the row's own. `column` is the place of a syntax error, from 1, or a column's name.
    `key` is the field of the row that is wrong.
    """

    def __init__(self, message: str, *, line: int = 0, column: str = "", key: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.column = column
        self.key = key


class UnknownFile(Trouble):
    """The file is of no format that is read here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """One row as a reader found it: its content, or what is wrong with it.

    `number` counts rows from 1; `line` is where it begins, from 1, and 0 in a file that has no lines.
    """

    number: int
    line: int
    content: Mapping[str, Any] | None = None
    trouble: Trouble | None = None


@dataclass(frozen=True, kw_only=True)
class OpenedFile:
    """A file whose format is known and whose rows can be read once. `columns` are a table's, else empty."""

    file_format: str
    compression: str
    columns: tuple[str, ...]
    rows: Iterator[SourceRow]
