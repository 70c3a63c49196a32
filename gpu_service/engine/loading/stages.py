"""The table of loading stages, and the one place that runs them.

A stage starts, goes on, and ends; a failure is wrapped here, once, from the exception classes that the stage's
libraries document. Anything else passes through to the engine's outermost boundary. Refuses a second attempt: nothing
here loops over other arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpu_service.engine.failures import LoadFailure, from_exception
from gpu_service.engine.loading import adapter, config, quantization, tokenizer, weights
from gpu_service.engine.loading.work import Loaded, LoadRequest, Progress
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.stopping import StopSwitch
from tunesmith.common.v1 import errors_pb2, event_pb2

# A stage's progress is reported each time that it has grown by this part of the whole.
_PROGRESS_PART = 0.05


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its name, what it does (returns details for the log), and what it is known to raise."""

    name: str
    run: Callable[[LoadRequest, Loaded, Progress], dict[str, str]]
    raises: tuple[type[Exception], ...]
    # Whose trouble a failure of the stage is, unless memory or disk ran out.
    fault: str


STAGES: tuple[Stage, ...] = (
    Stage(name="CONFIG", run=config.run, raises=config.RAISES, fault="USER"),
    Stage(name="TOKENIZER", run=tokenizer.run, raises=tokenizer.RAISES, fault="USER"),
    Stage(name="WEIGHTS", run=weights.run, raises=weights.RAISES, fault="USER"),
    Stage(name="QUANTIZATION", run=quantization.run, raises=quantization.RAISES, fault="PLATFORM"),
    Stage(name="ADAPTER", run=adapter.run, raises=adapter.RAISES, fault="USER"),
)


# All but what is trained: the base with its tokenizer.
BASE_STAGES = STAGES[:-1]


class StageReporter(Protocol):
    """Who hears of the stages; remembers the one in hand."""

    loading_stage: str

    def emit(self, message: Any) -> None: ...


def load(
    request: LoadRequest,
    loaded: Loaded,
    *,
    switch: StopSwitch,
    reporter: StageReporter,
    stages: Sequence[Stage] = STAGES,
) -> None:
    """Run the stages in order, into `loaded`. Raises LoadFailure from the library's own exception, StopRequested."""
    for stage in stages:
        switch.check()
        _run_stage(stage, request, loaded, switch, reporter)


def _run_stage(stage: Stage, request: LoadRequest, loaded: Loaded, switch: StopSwitch, reporter: StageReporter) -> None:
    progress = _ProgressReport(stage.name, switch, reporter)
    reporter.loading_stage = stage.name
    loaded.file = ""
    loaded.failure_details.clear()
    reporter.emit(_event(stage.name, event_pb2.STAGE_STATUS_STARTED))
    try:
        details = stage.run(request, loaded, progress)
    except stage.raises as error:
        failure = from_exception(
            error,
            reason=f"LOAD_{stage.name}",
            fault=stage.fault,
            stage=stage.name,
            file=loaded.file,
            details=loaded.failure_details,
        )
        reporter.emit(_event(stage.name, event_pb2.STAGE_STATUS_FAILED, seconds=progress.seconds, failure=failure))
        reporter.loading_stage = ""
        raise LoadFailure(failure) from error
    reporter.emit(
        event_pb2.LoadingEvent(
            stage=event_pb2.LoadingStage.Value(f"LOADING_STAGE_{stage.name}"),
            status=event_pb2.STAGE_STATUS_FINISHED,
            unit=progress.unit,
            done=progress.total,
            total=progress.total,
            seconds=progress.seconds,
            details=details,
        )
    )
    reporter.loading_stage = ""


def report_unforeseen_failure(reporter: Reporter, failure: errors_pb2.Failure) -> None:
    """Close the stage that an unforeseen exception ended; for the engine's outermost boundary."""
    if reporter.loading_stage:
        reporter.emit(_event(reporter.loading_stage, event_pb2.STAGE_STATUS_FAILED, failure=failure))
        reporter.loading_stage = ""


def _event(
    stage: str,
    status: event_pb2.StageStatus.ValueType,
    *,
    seconds: float = 0.0,
    failure: errors_pb2.Failure | None = None,
) -> event_pb2.LoadingEvent:
    return event_pb2.LoadingEvent(
        stage=event_pb2.LoadingStage.Value(f"LOADING_STAGE_{stage}"), status=status, seconds=seconds, failure=failure
    )


class _ProgressReport:
    """Counts a stage's progress and reports it now and then; each call is also a place to stop."""

    def __init__(self, stage: str, switch: StopSwitch, reporter: StageReporter) -> None:
        self._stage = stage
        self._switch = switch
        self._reporter = reporter
        self._start = time.monotonic()
        self._reported = 0
        self.unit = ""
        self.total = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def __call__(self, done: int, total: int, unit: str) -> None:
        self._switch.check()
        if unit != self.unit:
            # Another count from its start: files that were read in bytes are then placed in tensors.
            self._reported = 0
        self.unit, self.total = unit, total
        if done < total and done - self._reported < total * _PROGRESS_PART:
            return
        self._reported = done
        self._reporter.emit(
            event_pb2.LoadingEvent(
                stage=event_pb2.LoadingStage.Value(f"LOADING_STAGE_{self._stage}"),
                status=event_pb2.STAGE_STATUS_PROGRESS,
                unit=unit,
                done=done,
                total=total,
            )
        )
