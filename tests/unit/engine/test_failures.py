"""Exceptions to typed failures: the reason follows from the place and the class, never from words but torch's own."""

from __future__ import annotations

import errno

import pytest

from gpu_service.engine.failures import from_exception, qualified_name, unforeseen
from gpu_service.journal import JournalFull
from tunesmith.common.v1 import errors_pb2


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    ("error", "reason", "fault"),
    [
        (OutOfMemoryError("full"), "DEVICE_OUT_OF_MEMORY", "HARDWARE"),
        (MemoryError(), "HOST_OUT_OF_MEMORY", "HARDWARE"),
        (OSError(errno.ENOMEM, "cannot allocate memory"), "HOST_OUT_OF_MEMORY", "HARDWARE"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), "HOST_OUT_OF_MEMORY", "HARDWARE"),
        (OSError(errno.ENOSPC, "no space"), "DISK_FULL", "PLATFORM"),
        (JournalFull("no space"), "DISK_FULL", "PLATFORM"),
        (OSError(errno.EIO, "input/output error"), "EXPORT", "USER"),
        (RuntimeError("out of memory"), "EXPORT", "USER"),
    ],
)
def test_what_ran_out_is_named_wherever_it_happened(error: Exception, reason: str, fault: str) -> None:
    failure = from_exception(error, reason="EXPORT", fault="USER")
    assert errors_pb2.ErrorReason.Name(failure.reason) == f"ERROR_REASON_{reason}"
    assert errors_pb2.Fault.Name(failure.fault) == f"FAULT_{fault}"
    assert failure.message
    assert failure.exception_type == qualified_name(error)


@pytest.mark.parametrize(
    ("phase", "stage", "reason"),
    [
        ("", "", "INTERNAL"),
        ("PLANNING", "", "PLANNING"),
        ("LOADING", "TOKENIZER", "LOAD_TOKENIZER"),
        ("EVALUATING", "", "TRAINING"),
        ("TRAINING", "", "TRAINING"),
        ("SAVING", "", "EXPORT"),
    ],
)
def test_unforeseen(phase: str, stage: str, reason: str) -> None:
    failure = unforeseen(ZeroDivisionError("why"), phase=phase, loading_stage=stage, file="a.json" if stage else "")
    assert errors_pb2.ErrorReason.Name(failure.reason) == f"ERROR_REASON_{reason}"
    assert failure.exception_type == "ZeroDivisionError"
    assert failure.stage == stage or failure.stage == phase
    assert failure.versions["torch"]


def test_names_of_classes() -> None:
    assert qualified_name(ValueError()) == "ValueError"
    assert qualified_name(JournalFull()) == "gpu_service.journal.file.JournalFull"
