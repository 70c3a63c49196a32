"""How a run can fail, typed. An exception is wrapped once, where it is understood, and keeps its own name and words.

Refuses to guess from messages: reasons follow from where something happened and from the exception's class. The one
exception is torch's allocator of host memory, for whose failure torch has no class.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from importlib import metadata

from gpu_service.journal import JournalFull
from gpu_service.journal.events import failure as build_failure
from tunesmith.common.v1 import errors_pb2

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "tokenizers")
_MAX_MESSAGE_CHARACTERS = 4000
_HOST_ALLOCATOR = "DefaultCPUAllocator:"
# What an exception of any kind means when it ends a phase; loading stages name their own.
_REASON_BY_PHASE: Mapping[str, str] = {
    "PLANNING": "PLANNING",
    "EVALUATING": "TRAINING",
    "TRAINING": "TRAINING",
    "SAVING": "EXPORT",
}


def library_versions() -> dict[str, str]:
    """Installed version of each library that loading and training lean on, by distribution name."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def qualified_name(error: BaseException) -> str:
    """Name of the exception's class with its module, e.g. `safetensors.SafetensorError`; bare for builtins."""
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


class RunFailure(Exception):
    """The run ends FAILED with `failure`. The exception that caused it, if any, is `__cause__`."""

    def __init__(self, failure: errors_pb2.Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class LoadFailure(RunFailure):
    """A loading stage failed; `failure.stage` names it."""


def _resource_reason(error: BaseException) -> tuple[str, str] | None:
    """Reason and fault when a resource ran out, whatever was being done."""
    names = {kind.__qualname__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return "DEVICE_OUT_OF_MEMORY", "HARDWARE"
    is_short = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if is_short or (isinstance(error, RuntimeError) and _HOST_ALLOCATOR in str(error)):
        return "HOST_OUT_OF_MEMORY", "HARDWARE"
    if isinstance(error, JournalFull):
        return "DISK_FULL", "PLATFORM"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "DISK_FULL", "PLATFORM"
    return None


def from_exception(
    error: BaseException,
    *,
    reason: str,
    fault: str,
    stage: str = "",
    file: str = "",
    details: Mapping[str, str] | None = None,
) -> errors_pb2.Failure:
    """The failure that `error` means:

    `reason`, unless memory or disk ran out. Message and type are the library's own.
    """
    resource = _resource_reason(error)
    if resource is not None:
        reason, fault = resource
    return build_failure(
        reason=reason,
        fault=fault,
        message=(str(error) or qualified_name(error))[:_MAX_MESSAGE_CHARACTERS],
        stage=stage,
        exception_type=qualified_name(error),
        file=file,
        versions=library_versions(),
        details=details,
    )


def unforeseen(error: BaseException, *, phase: str, loading_stage: str, file: str) -> errors_pb2.Failure:
    """The failure of an exception that nothing on the way understood, for the engine's outermost boundary."""
    if loading_stage:
        return from_exception(error, reason=f"LOAD_{loading_stage}", fault="PLATFORM", stage=loading_stage, file=file)
    return from_exception(error, reason=_REASON_BY_PHASE.get(phase, "INTERNAL"), fault="PLATFORM", stage=phase)
