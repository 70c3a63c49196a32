"""The one way an import fails: a reason a program can read and a sentence a person can read. It prints nothing."""

from __future__ import annotations

import enum
import errno
from collections.abc import Iterator
from contextlib import contextmanager


class Reason(enum.StrEnum):
    """Why an import was refused; the names are part of the command's output."""

    ALREADY_EXISTS = "ALREADY_EXISTS"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    DOWNLOAD_FAILED = "DOWNLOAD_FAILED"
    INVALID_MODEL = "INVALID_MODEL"
    INVALID_NAME = "INVALID_NAME"
    INVALID_TOKEN_FILE = "INVALID_TOKEN_FILE"
    INVALID_WHEEL = "INVALID_WHEEL"
    NO_SPACE = "NO_SPACE"
    PICKLE_WEIGHTS = "PICKLE_WEIGHTS"
    REMOTE_CODE = "REMOTE_CODE"
    SOURCE_NOT_FOUND = "SOURCE_NOT_FOUND"
    STORAGE_FAILED = "STORAGE_FAILED"
    UNSUPPORTED_TOKENIZER = "UNSUPPORTED_TOKENIZER"


class ImportRefused(Exception):
    """Nothing was written below the model's name."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@contextmanager
def storage_errors() -> Iterator[None]:
    """Give the operating system's refusals a reason; its own message names the file."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = Reason.NO_SPACE if full else Reason.STORAGE_FAILED
        raise ImportRefused(reason, f"the model's files could not be written: {error}") from error
