"""One export: written by its builder, then compared with the adapter. Decides only whether it is near enough."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from gpu_service.catalog import exports
from gpu_service.engine.artifacts.export_source import ExportSource
from gpu_service.engine.artifacts.logit_difference import compare
from gpu_service.engine.failures import RunFailure, library_versions
from gpu_service.journal.events import failure
from tunesmith.common.v1 import event_pb2

WARNING_CODE = "export-differs"
# Of one that could not be made at all.
FAILED_CODE = "export-failed"


def write(
    name: str, source: ExportSource, directory: Path, *, threshold: float, check: Callable[[], None]
) -> event_pb2.ExportEvent:
    """Write export `name` into the empty `directory` and say how it compares; `check` may raise to stop."""
    import_module(exports.REGISTRY[name].builder).write(source, directory, check)
    comparison = compare(source, directory, check)
    adapter, trained = comparison.adapter, comparison.trained
    return event_pb2.ExportEvent(
        format=name,
        max_logit_difference=adapter.max_difference,
        mean_logit_difference=adapter.mean_difference,
        threshold=threshold,
        num_prompts=comparison.num_prompts,
        num_same_top_tokens=adapter.num_same_top_tokens,
        num_positions=adapter.num_positions,
        # A difference that is not a number is not within the threshold.
        accepted=adapter.max_difference <= threshold,
        trained_max_logit_difference=trained.max_difference,
        trained_mean_logit_difference=trained.mean_difference,
        trained_num_same_top_tokens=trained.num_same_top_tokens,
    )


def describe_refusal(event: event_pb2.ExportEvent) -> str:
    """Why an export was refused."""
    return (
        f"export {event.format!r} was refused: its logits differ from the adapter's by up to "
        f"{event.max_logit_difference:.4g} on the fixed prompts, and max_export_logit_difference is {event.threshold:g}"
    )


def refused(event: event_pb2.ExportEvent) -> RunFailure:
    """The failure of a run that was there for this export alone."""
    return RunFailure(
        failure(
            reason="EXPORT_DIFFERS",
            fault="PLATFORM",
            message=describe_refusal(event),
            stage="SAVING",
            file=f"artifacts/{event.format}",
            versions=library_versions(),
            details={
                "max_logit_difference": f"{event.max_logit_difference:g}",
                "threshold": f"{event.threshold:g}",
            },
        )
    )
