"""Where the rows of a dataset blob begin, so that any of them can be read alone. Decodes and keeps no row.

The index of a blob is made in one pass that also checks the blob's hash, and is kept in the cache; both are mapped.
"""

import hashlib
import json
import mmap
from array import array
from pathlib import Path
from typing import Any

from gpu_service.domain.errors import Fault, Refusal
from gpu_service.domain.planned_data import PlannedDataDamaged, map_file
from gpu_service.domain.spec import DatasetReference
from gpu_service.planner.rows import (
    BYTE_ORDER_MARK,
    MAXIMUM_LINE_BYTES,
    RowError,
    decode_row,
    find_blob,
    malformed,
)
from gpu_service.planner.staging import stage_directory

_FACTS_FILE = "index.json"
_STARTS_FILE = "starts.bin"
_VERSION = 1
# Entries held before they are written.
_FLUSH_ENTRIES = 1 << 16
_COUNT_BYTES = 1 << 20


class RowIndex:
    """Rows of one blob, counted from 0; lines that are blank are none. Open with `open_index`."""

    def __init__(self, directory: Path, reference: DatasetReference, blobs_directory: Path) -> None:
        facts = json.loads((directory / _FACTS_FILE).read_bytes())
        self.num_rows: int = facts["num_rows"]
        self.num_bytes: int = facts["num_bytes"]
        self._starts = map_file(directory / _STARTS_FILE, 8 * (self.num_rows + 1)).cast("Q")
        self._reference = reference
        self._blobs_directory = blobs_directory
        self._blob: mmap.mmap | None = None

    def row_bytes(self, row: int) -> int:
        """Bytes of a row in the blob, with what ends its line."""
        return self._starts[row + 1] - self._starts[row]

    def read(self, row: int) -> dict[str, Any]:
        """The row itself. Raises `Refusal` DATASET_MALFORMED naming the line, BLOB_NOT_FOUND."""
        content = self._open()[self._starts[row] : self._starts[row + 1]]
        try:
            return decode_row(content)
        except RowError as error:
            raise self.malformed(row, str(error)) from error

    def malformed(self, row: int, message: str) -> Refusal:
        """The refusal of one row; the line is counted only now."""
        return malformed(self._reference, self.find_line(row), message)

    def find_line(self, row: int) -> int:
        """The line of a row, from 1. Reads the blob up to it."""
        blob, left, line = self._open(), self._starts[row], 1
        for start in range(0, left, _COUNT_BYTES):
            line += blob[start : min(start + _COUNT_BYTES, left)].count(b"\n")
        return line

    def _open(self) -> mmap.mmap:
        if self._blob is None:
            # What a plan needs may all be in the cache: the blob is looked for when it is read.
            with find_blob(self._blobs_directory, self._reference).open("rb") as file:
                self._blob = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._blob


def open_index(reference: DatasetReference, *, blobs_directory: Path, rows_directory: Path) -> RowIndex:
    """The index of a dataset's blob, from the cache or made now.

    Raises `Refusal` BLOB_NOT_FOUND, CHECKSUM_MISMATCH, DATASET_MALFORMED for a line that is too long.
    """
    name = hashlib.sha256(f"rows {_VERSION} {reference.sha256}".encode()).hexdigest()
    target = rows_directory / name
    if not _is_whole(target):
        blob = find_blob(blobs_directory, reference)
        with stage_directory(target, is_whole=_is_whole) as staged:
            _write(staged, blob, reference)
    return RowIndex(target, reference, blobs_directory)


def _write(staged: Path, blob: Path, reference: DatasetReference) -> None:
    digest = hashlib.sha256()
    starts, num_rows, position, number = array("Q"), 0, 0, 0
    with blob.open("rb") as file, (staged / _STARTS_FILE).open("wb") as out:
        while line := file.readline(MAXIMUM_LINE_BYTES + 1):
            number += 1
            digest.update(line)
            if len(line) > MAXIMUM_LINE_BYTES:
                raise malformed(reference, number, f"the line is longer than {MAXIMUM_LINE_BYTES} bytes")
            mark = len(BYTE_ORDER_MARK) if number == 1 and line.startswith(BYTE_ORDER_MARK) else 0
            if line[mark:].strip():
                starts.append(position + mark)
                num_rows += 1
                if len(starts) == _FLUSH_ENTRIES:
                    out.write(starts.tobytes())
                    starts = array("Q")
            position += len(line)
        starts.append(position)
        out.write(starts.tobytes())
    if digest.hexdigest() != reference.sha256:
        raise Refusal(
            "CHECKSUM_MISMATCH",
            Fault.PLATFORM,
            f"the blob of dataset {reference.dataset_id} does not have its SHA-256",
            stage="PLANNING",
            details={"dataset_id": str(reference.dataset_id), "sha256": reference.sha256},
        )
    facts = {"num_rows": num_rows, "num_bytes": position}
    (staged / _FACTS_FILE).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")


def _is_whole(directory: Path) -> bool:
    try:
        facts = json.loads((directory / _FACTS_FILE).read_bytes())
        map_file(directory / _STARTS_FILE, 8 * (facts["num_rows"] + 1))
    except (OSError, ValueError, KeyError, TypeError, PlannedDataDamaged):
        return False
    return True
