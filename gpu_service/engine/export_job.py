"""A run that only exports: what an earlier job left is on its base, and is written in the forms that were asked for.

An export that differs too much is the failure of such a run, since there is nothing else to it.
"""

from __future__ import annotations

from pathlib import Path

from gpu_service.engine.artifacts import ArtifactRequest, exporting, write_all
from gpu_service.engine.artifacts.export_source import open_source
from gpu_service.engine.failures import library_versions
from gpu_service.engine.loading import Loaded
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.request import RunRequest
from gpu_service.engine.stopping import StopSwitch
from gpu_service.engine.training.progress import TrainingProgress
from tunesmith.common.v1 import plan_pb2

_CARD = "README.md"


def export(*, request: RunRequest, plan: plan_pb2.Plan, loaded: Loaded, switch: StopSwitch, reporter: Reporter) -> None:
    """Write the plan's exports and the report. Raises StopRequested, RunFailure (EXPORT_DIFFERS among others)."""
    switch.check()
    reporter.enter_phase("SAVING")
    written = write_all(
        ArtifactRequest(
            directory=request.artifacts_directory,
            model_directory=request.model_directory,
            job_id=request.job_id,
            spec=request.spec,
            plan=plan,
            trains_adapter=True,
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            stored_dtype=loaded.stored_dtype,
            progress=TrainingProgress(),
            stopped_early=False,
            versions=library_versions(),
            export_source=open_source(request=request, plan=plan, model=loaded.model, loaded=loaded),
            trained=False,
            earlier_card="" if request.start is None else _read_card(request.start.directory / _CARD),
        ),
        switch.check,
        switch,
    )
    for event in written.exports:
        reporter.emit(event)
    for event in written.exports:
        if not event.accepted:
            raise exporting.refused(event)
    for artifact in written.artifacts:
        reporter.emit(artifact)


def _read_card(path: Path) -> str:
    # A checkpoint has none.
    return path.read_text(encoding="utf-8") if path.is_file() else ""
