"""How a run ends: the adapter comes off, memory is given back, and the last two events are written.

The base stays for the next run when it is clean; after a failure nothing stays, because the engine ends too. Refuses to
say that memory is free before it was measured.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

from gpu_service.engine.loading import report_unforeseen_failure
from gpu_service.engine.resident import ResidentBase
from gpu_service.engine.run import Run
from gpu_service.journal import JournalFull
from gpu_service.journal.failpoints import failpoint
from tunesmith.common.v1 import errors_pb2, event_pb2


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended; `failure` is set when the state is FAILED.

    `ends_engine`: what the run left in this process is unknown, so no other run may follow.
    """

    state: event_pb2.RunState.ValueType
    failure: errors_pb2.Failure | None = None
    ends_engine: bool = False


def conclude(run: Run, outcome: Outcome) -> None:
    """Give back what the run held and write its last events. Raises OSError when not even those can be written."""
    if outcome.failure is not None:
        # A full disk keeps room for the two closing events only.
        with suppress(JournalFull):
            report_unforeseen_failure(run.reporter, outcome.failure)
    start = time.monotonic()
    used_before = run.device.used_bytes()
    if not outcome.ends_engine:
        _keep_base(run)
    run.loaded = None
    run.resident = None
    run.device.give_back()
    freed = max(used_before - run.device.used_bytes(), 0)
    run.reporter.emit(
        event_pb2.MemoryReleasedEvent(
            freed_bytes=freed,
            resident_bytes=0 if outcome.ends_engine else run.shelf.describe().get("bytes", 0),
            seconds=time.monotonic() - start,
            engine_ended=outcome.ends_engine,
        )
    )
    failpoint("ending.before-terminal")
    run.reporter.enter_state(outcome.state, outcome.failure)
    failpoint("ending.after-terminal")


def _keep_base(run: Run) -> None:
    """Put the run's base back on the shelf, without adapter, when it can serve another run."""
    loaded, method, key = run.loaded, run.method, run.key
    if loaded is None or method is None or key is None or not method.TRAINS_ADAPTER:
        return
    base = loaded.base if loaded.model is None else method.detach(loaded.model)
    if base is None and run.resident is not None:
        base = run.resident.model
    if base is None:
        return
    run.shelf.put(
        ResidentBase(
            key=key,
            base_model=run.request.spec.base_model,
            model=base,
            stored_dtype=loaded.stored_dtype,
            num_bytes=base.get_memory_footprint(),
        )
    )
