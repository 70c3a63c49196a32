"""Tells what steps came to: reads a step's numbers at its end and emits its event, in the order of the steps.

On a device that is handed steps ahead, by a thread of its own: the thread that trains hands out kernels until there is
room for no more of them, which may be most of a step. Changes nothing that training reads; that is the loop's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from gpu_service.domain.planned_data import PlannedData
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.stopping import StopRequested
from gpu_service.engine.training.batches import MicroBatch
from gpu_service.engine.training.losses import LossTally
from gpu_service.engine.training.step_report import StepFacts, StepReport
from gpu_service.engine.training.updates import StepNumbers
from tunesmith.common.v1 import event_pb2


@dataclass(frozen=True, kw_only=True)
class IssuedStep:
    """A step that was handed to the device, counted from 0. `read` waits until it is over."""

    step: int
    batches: list[MicroBatch]
    weights: list[tuple[int, ...]]
    learning_rate: float
    peak_memory_bytes: int
    read: Callable[[], StepNumbers]


@dataclass(frozen=True, kw_only=True)
class ToldStep:
    """A step that is over. `problem` says what was not finite; empty where all was."""

    issued: IssuedStep
    numbers: StepNumbers
    event: event_pb2.StepEvent
    problem: str
    # A stop came while its event waited for room on the disk: it is not in the journal.
    stop: StopRequested | None


def _make_thread(device: torch.device) -> ThreadPoolExecutor:
    # Whoever waits for one device with another one current makes a context there.
    prepare = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="steps", initializer=prepare)


class StepTeller:
    """Of one training. `hand_over` and `close` are the training thread's."""

    def __init__(
        self, *, data: PlannedData, reporter: Reporter, halts: bool, background_on: torch.device | None
    ) -> None:
        """`halts`: nothing is told behind a step that was not finite. `background_on` is the device whose steps a
        thread waits for; None: there is no thread.
        """
        self._data, self._reporter, self._halts = data, reporter, halts
        self._report = StepReport(data=data)
        self._over = False
        self._thread = None if background_on is None else _make_thread(background_on)

    def hand_over(self, issued: IssuedStep) -> Callable[[], ToldStep]:
        """What is given waits until the step is told, and raises what kept it from that but a stop.

        Where nothing is done in the background, it is what tells the step.
        """
        if self._thread is None:
            return lambda: self._tell(issued)
        return self._thread.submit(self._tell, issued).result

    def close(self) -> None:
        """Wait for what is being told; nothing else is."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _tell(self, issued: IssuedStep) -> ToldStep:
        # Nor is anything told behind what could not be.
        was_over, self._over = self._over, True
        numbers, tally = issued.read(), LossTally()
        rows = list(numbers.rows)
        for batch, weight in zip(issued.batches, issued.weights, strict=True):
            tally.add(batch, weight, rows[: len(weight)], self._data.sources)
            del rows[: len(weight)]
        event = self._report.describe(
            StepFacts(
                step=issued.step,
                batches=issued.batches,
                tally=tally,
                norm=numbers.norm,
                learning_rate=issued.learning_rate,
                seconds=numbers.seconds,
                peak_memory_bytes=issued.peak_memory_bytes,
                skipped=not numbers.updated,
            )
        )
        problem, stop = "", None
        if not was_over:
            try:
                self._reporter.emit(event)
                problem = "" if numbers.is_finite else self._warn_not_finite(event)
            except StopRequested as asked:
                stop = asked
            self._over = self._halts and not numbers.is_finite
        return ToldStep(issued=issued, numbers=numbers, event=event, problem=problem, stop=stop)

    def _warn_not_finite(self, event: event_pb2.StepEvent) -> str:
        """Say which data it came from, as far as the losses tell. The message."""
        blamed = [value for value in event.dataset_losses if not value.HasField("loss")]
        what = "the loss" if blamed else "the gradient"
        where = "".join(f", trait {value.trait_type}, dataset {value.dataset_id}" for value in blamed)
        message = f"{what} of step {event.step}{where} is not a finite number; its update was not applied"
        only = blamed[0] if len(blamed) == 1 else event_pb2.LossValue()
        self._reporter.warn("non-finite-loss", message, trait_type=only.trait_type, dataset_id=only.dataset_id)
        return message
