"""A dataset blob as rows: streams JSONL line by line and checks its hash. Knows no format and keeps no row."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_service.domain.errors import Fault, Refusal
from gpu_service.domain.spec import DatasetReference

MAXIMUM_LINE_BYTES = 16 * 1024 * 1024
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowError(Exception):
    """A row is not what its format wants; the message says why, without the line, which the reader knows."""


def find_blob(blobs_directory: Path, reference: DatasetReference) -> Path:
    """The blob's path. Raises `Refusal` BLOB_NOT_FOUND, also for a name that is no SHA-256."""
    sha256 = reference.sha256
    path = blobs_directory / sha256[:2] / sha256
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef") or not path.is_file():
        raise Refusal(
            "BLOB_NOT_FOUND",
            Fault.PLATFORM,
            f"dataset {reference.dataset_id} ({sha256 or 'no hash'}) is not among this node's blobs",
            stage="PLANNING",
            details={"dataset_id": str(reference.dataset_id), "sha256": sha256},
        )
    return path


def read_rows(path: Path, reference: DatasetReference) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and row of each line that is not blank, one line in memory at a time.

    Raises `Refusal` DATASET_MALFORMED naming dataset and line, and CHECKSUM_MISMATCH after the last line.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAXIMUM_LINE_BYTES + 1):
            number += 1
            digest.update(line)
            if len(line) > MAXIMUM_LINE_BYTES:
                raise malformed(reference, number, f"the line is longer than {MAXIMUM_LINE_BYTES} bytes")
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                try:
                    row = decode_row(line)
                except RowError as error:
                    raise malformed(reference, number, str(error)) from error
                yield number, row
    if digest.hexdigest() != reference.sha256:
        raise Refusal(
            "CHECKSUM_MISMATCH",
            Fault.PLATFORM,
            f"the blob of dataset {reference.dataset_id} does not have its SHA-256",
            stage="PLANNING",
            details={"dataset_id": str(reference.dataset_id), "sha256": reference.sha256},
        )


def malformed(reference: DatasetReference, line: int, message: str) -> Refusal:
    """The refusal of one line of a dataset."""
    return Refusal(
        "DATASET_MALFORMED",
        Fault.USER,
        f"dataset {reference.dataset_id}, line {line}: {message}",
        stage="PLANNING",
        field="datasets",
        details={"dataset_id": str(reference.dataset_id), "line": str(line)},
    )


def decode_row(line: bytes) -> dict[str, Any]:
    """The JSON object on a line. Raises `RowError`."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise RowError("is nested too deeply") from error
    except ValueError as error:
        raise RowError(f"is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowError("is not a JSON object")
    return row
