"""Runs what the control pipe brings, one run or generation after the other, and is the outermost boundary of each run.

Here, and only here, an exception that nothing understood becomes a typed failure; the engine ends after it, because
what it left in the process is unknown. Imports torch: the entry point loads this module late.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from gpu_service.engine import devices, libraries, request
from gpu_service.engine.control import ControlPipe
from gpu_service.engine.early_start import EarlyStart
from gpu_service.engine.ending import BaseLine, Outcome, conclude
from gpu_service.engine.failures import RunFailure, unforeseen
from gpu_service.engine.generation.order import GenerationOrder
from gpu_service.engine.reporter import Notify, Reporter
from gpu_service.engine.resident import BaseShelf
from gpu_service.engine.room import wait_for_room
from gpu_service.engine.run import Run
from gpu_service.engine.session import Session
from gpu_service.engine.spare_planner import PLANNER_COMMAND, SparePlanner
from gpu_service.engine.stopping import StopMode, StopRequested, StopSwitch
from gpu_service.journal import JournalFull, Writer
from tunesmith.common.v1 import event_pb2

_LOG = logging.getLogger(__name__)

EXIT_CLEAN = 0
# After a run or a generation failed in this process; a run's outcome is in the journal.
EXIT_AFTER_FAILURE = 70
# What a cancelled run held did not come back, so that only the end of the process gives it back; the shim tells the
# run's outcome behind that.
EXIT_MEMORY_HELD = 71


class _OrderCame(Exception):
    """There is work, which pays for the rest of what it needs itself."""


_STATE_BY_STOP = {
    StopMode.CANCEL: event_pb2.RUN_STATE_CANCELLED,
    StopMode.CHECKPOINT: event_pb2.RUN_STATE_INTERRUPTED,
}


def serve(
    pipe: ControlPipe,
    spare_planner: SparePlanner | None = None,
    device_id: str = "",
    model_directory: Path | None = None,
    early: EarlyStart | None = None,
) -> int:
    """Carry out runs and generations until the pipe says to end. The process' exit status.

    `device_id` is the device to be made ready for before there is any (`cuda:0`), with the tokenizer of a model that is
    likely to be wanted; empty: none. `early` is what was begun before this could be called.
    """
    shelf = BaseShelf()
    if not pipe.has_order:
        _prepare(pipe, shelf, device_id, model_directory)
    pipe.notify({"type": "ready"})
    # What the libraries made when they were imported lives as long as the process. The collections that give a run's
    # memory back need not walk it: a third of a second each.
    gc.freeze()
    while (order := pipe.next_order()) is not None:
        if isinstance(order, GenerationOrder):
            # Answers are the libraries' work, which a training may have done without.
            libraries.need(pipe.note_progress)
            generation = import_module("gpu_service.engine.generation.service")
            ends_engine = generation.carry_out(order, shelf=shelf, notify=pipe.notify)
            pipe.end_generation(order)
            if ends_engine:
                return EXIT_AFTER_FAILURE
            continue
        run_directory = order
        switch = StopSwitch(pipe.note_progress, pipe.announce_pause)
        pipe.begin(run_directory, switch)
        outcome = carry_out(
            run_directory,
            shelf=shelf,
            switch=switch,
            notify=pipe.notify,
            clear=pipe.clear,
            spare_planner=spare_planner,
            early=early,
        )
        early = None
        pipe.end()
        if not outcome.is_told:
            return EXIT_MEMORY_HELD
        pipe.notify(
            {
                "type": "run_finished",
                "run_directory": str(run_directory),
                "state": event_pb2.RunState.Name(outcome.state).removeprefix("RUN_STATE_"),
                "resident": {} if outcome.ends_engine else shelf.describe(),
            }
        )
        if outcome.ends_engine:
            return EXIT_AFTER_FAILURE
        if spare_planner is not None and not pipe.shutting_down:
            spare_planner.prepare()
    return EXIT_CLEAN


def _prepare(pipe: ControlPipe, shelf: BaseShelf, device_id: str, model_directory: Path | None) -> None:
    """Use the time before there is work: what a training wants first, then what answers, samples and saving do."""
    if device_id:
        warm_up = import_module("gpu_service.engine.warm_up")
        shelf.kernel_problem = warm_up.make_ready(device_id, lambda: pipe.has_order, model_directory)

    def note() -> None:
        pipe.note_progress()
        if pipe.has_order:
            raise _OrderCame

    with suppress(_OrderCame):
        libraries.need(note)
        note()
        if device_id and model_directory is not None:
            warm_up.read_tokenizer(model_directory, shelf.tokenizers)


def carry_out(
    run_directory: Path,
    *,
    shelf: BaseShelf,
    switch: StopSwitch,
    notify: Notify,
    planner_command: Sequence[str] = PLANNER_COMMAND,
    spare_planner: SparePlanner | None = None,
    make_session: Callable[..., Session] = Session,
    clear: Callable[[Path], bool] = lambda run_directory: True,
    early: EarlyStart | None = None,
) -> Outcome:
    """One run from its `run.json` to its terminal event, unless the outcome says that it is not told.

    `clear(run_directory)` ends the processes that the run left; False when nobody could. Raises only when the journal
    itself cannot be used.
    """
    asked = request.read(run_directory)
    with Writer.open(asked.journal_path, asked.attempt) as writer:
        run = Run(
            request=asked,
            device=devices.select(asked.device),
            shelf=shelf,
            switch=switch,
            reporter=Reporter(run_directory=run_directory, writer=writer, notify=notify),
            planner_command=planner_command,
            spare_planner=spare_planner,
            make_session=make_session,
            begun_plan=None if early is None else early.take(run_directory),
            begun_head_start=None if early is None else early.head_start,
        )
        base_line = BaseLine.of(run)
        # A full disk costs time, and nothing that was trained; a stop is heard meanwhile.
        run.reporter.when_full = lambda: wait_for_room(switch.check)
        outcome = _execute(run)
        run.drop_begun()
        # The closing events have room of their own, and nobody waits behind the end.
        run.reporter.when_full = None
        if not clear(run_directory) and outcome.state == event_pb2.RUN_STATE_CANCELLED:
            # Not before the last process is gone: whoever buries the shim ends them, this one too, and says so.
            return replace(outcome, ends_engine=True, is_told=False)
        # Outside the handlers: an exception's traceback keeps the model's memory alive.
        return conclude(run, outcome, base_line)


def _execute(run: Run) -> Outcome:
    try:
        run.reporter.enter_state(event_pb2.RUN_STATE_RUNNING)
        run.execute()
    except StopRequested as stop:
        run.reporter.loading_stage = ""
        # Stopping is what would end the waiting for room.
        run.reporter.when_full = None
        with suppress(JournalFull):
            run.reporter.enter_stopping()
        return Outcome(state=_STATE_BY_STOP[stop.mode])
    except RunFailure as error:
        _LOG.warning("run failed", exc_info=True)
        # A refusal by the planner leaves nothing behind: loading had not begun.
        return Outcome(state=event_pb2.RUN_STATE_FAILED, failure=error.failure, ends_engine=run.loaded is not None)
    except Exception as error:  # noqa: BLE001 - the run's outermost boundary: typed, told, and the engine ends
        _LOG.exception("run failed in an unforeseen way")
        failure = unforeseen(
            error,
            phase=run.reporter.phase,
            loading_stage=run.reporter.loading_stage,
            file="" if run.loaded is None else run.loaded.file,
        )
        return Outcome(state=event_pb2.RUN_STATE_FAILED, failure=failure, ends_engine=True)
    return Outcome(state=event_pb2.RUN_STATE_SUCCEEDED)
