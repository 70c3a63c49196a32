"""How a run ends: the adapter comes off, memory is given back, and the last two events are written.

The base stays for the next run when it is clean; after a failure nothing stays, because the engine ends too. Refuses to
say that memory is free before it was measured: a run whose memory did not come back is not called cancelled here, but
by the shim behind the engine's end.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from gpu_service.engine.loading import report_unforeseen_failure
from gpu_service.engine.resident import ResidentBase, held_bytes
from gpu_service.engine.run import Run
from gpu_service.journal import JournalFull
from gpu_service.journal.failpoints import failpoint
from tunesmith.common.v1 import errors_pb2, event_pb2

_LOG = logging.getLogger(__name__)
# What a cancelled run may leave held above the base line, as the contract says it.
_SLACK_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended; `failure` is set when the state is FAILED.

    `ends_engine`: what the run left in this process is unknown, so no other run may follow.
    """

    state: event_pb2.RunState.ValueType
    failure: errors_pb2.Failure | None = None
    ends_engine: bool = False
    # False: the journal does not say how the run ended; that is the shim's to say, once this process is gone.
    is_told: bool = True


@dataclass(frozen=True, kw_only=True)
class BaseLine:
    """What the engine held before a run, without the base that may have been on its shelf."""

    num_bytes: int

    @classmethod
    def of(cls, run: Run) -> BaseLine:
        """As it is now; on a device whose first work is this run's, that was begun early, it was nothing."""
        if run.begun_head_start is not None and run.device.torch_device.type != "cpu":
            return cls(num_bytes=0)
        return cls(num_bytes=run.device.held_bytes() - run.shelf.describe().get("bytes", 0))


def conclude(run: Run, outcome: Outcome, base_line: BaseLine) -> Outcome:
    """Give back what the run held and write its last events; the outcome, as it came to be.

    Nothing is written when a cancelled run's memory did not come back. Raises OSError when the events cannot be
    written.
    """
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
    if outcome.state == event_pb2.RUN_STATE_CANCELLED:
        # It is no part of what is measured, and may be larger than what a cancelled run may leave.
        run.shelf.tokenizers.clear()
    run.device.give_back()
    resident_bytes = 0 if outcome.ends_engine else run.shelf.describe().get("bytes", 0)
    left_bytes = run.device.held_bytes() - base_line.num_bytes - resident_bytes
    if outcome.state == event_pb2.RUN_STATE_CANCELLED and left_bytes > _SLACK_BYTES:
        _LOG.warning("%d bytes of a cancelled run did not come back; the engine ends for them", left_bytes)
        return replace(outcome, ends_engine=True, is_told=False)
    freed = max(used_before - run.device.used_bytes(), 0)
    run.reporter.emit(
        event_pb2.MemoryReleasedEvent(
            freed_bytes=freed,
            resident_bytes=resident_bytes,
            seconds=time.monotonic() - start,
            engine_ended=outcome.ends_engine,
        )
    )
    failpoint("ending.before-terminal")
    run.reporter.enter_state(outcome.state, outcome.failure)
    failpoint("ending.after-terminal")
    return outcome


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
            num_bytes=held_bytes(base),
        )
    )
