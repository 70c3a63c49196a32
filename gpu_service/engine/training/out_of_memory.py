"""Survives a device that runs out of memory: the same work is begun again, keeping less, or in smaller passes.

Only work that changes nothing until it is done may be given to it: a step's gradient, an evaluation. Which examples
make a step stays the plan's, so a smaller pass changes memory and not what is computed, up to rounding. Refuses when a
pass holds a single example already: the library's own error goes on to whoever asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from gpu_service.domain.planned_data import ExampleReference, PlannedData
from gpu_service.engine.devices import Device
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.training import random_state
from gpu_service.engine.training.batches import MicroBatchLimit, split
from gpu_service.engine.training.progress import TrainingProgress
from tunesmith.common.v1 import event_pb2

Result = TypeVar("Result")
RECOMPUTING_MORE = "recomputing-more"
ADDS_UP_ROUGHLY = "gradients-add-up-roughly"


@dataclasses.dataclass(kw_only=True)
class PassSize:
    """How large a forward pass may be, from now on. What it came down to is in `progress`, and so in checkpoints."""

    planned: MicroBatchLimit
    data: PlannedData
    device: Device
    reporter: Reporter
    progress: TrainingProgress
    # The work is one pass whatever happens: no smaller ones add up to it.
    is_one_pass: bool = False
    # Has less stand on the device, with the same results: how, in words; empty where nothing more can be saved so.
    keep_less: Callable[[], str] = lambda: ""
    # The same at the cost of precision, where passes cannot be made smaller either.
    last_resort: Callable[[], str] = lambda: ""

    @property
    def limit(self) -> MicroBatchLimit:
        """The plan's limits, or what memory left of them: to an evaluation alone, where a step is one pass."""
        if self.is_one_pass:
            return self.planned
        return dataclasses.replace(self.planned, **self.progress.pass_limits)

    def carry_out(
        self,
        work: Callable[[MicroBatchLimit], Result],
        references: Sequence[ExampleReference],
        *,
        step: int,
        undo: Callable[[], None] = lambda: None,
    ) -> Result:
        """What `work` gives, with passes over `references` as large as memory allows. `step` counts from 1.

        After running out, `undo` drops what the work had made, random generators are put back, and it begins again.
        Raises torch.OutOfMemoryError when no pass can be made smaller.
        """
        device = self.device.torch_device
        while True:
            before = random_state.capture(device)
            try:
                return work(self.limit)
            except torch.OutOfMemoryError:
                peak_bytes = self.device.peak_bytes()
                code, described = RECOMPUTING_MORE, self.keep_less()
                smaller = None if described else self._halve(references)
                if not described and smaller is None:
                    code, described = ADDS_UP_ROUGHLY, self.last_resort()
                if not described and smaller is None:
                    raise
            # Outside the handler: the exception's traceback keeps the failed pass in memory.
            undo()
            self.device.give_back()
            random_state.restore(*before, device)
            if smaller is None:
                self.reporter.warn(code, f"device memory ran out at step {step}; from now on {described}")
            else:
                self._reduce(smaller, step, peak_bytes)

    def _halve(self, references: Sequence[ExampleReference]) -> tuple[str, int, int] | None:
        """Unit, limit of before and next limit; None when every pass holds a single example, or must not be smaller."""
        if self.is_one_pass:
            return None
        passes = [part for part in split(self.data, references, self.limit) if len(part) > 1]
        if not passes:
            return None
        if self.limit.tokens is None:
            largest = max(len(part) for part in passes)
            return "examples", self.limit.examples or largest, largest // 2
        # A limit of tokens that the largest pass does not reach would change nothing.
        tokens = max(sum(len(self.data.example(one).tokens) for one in part) for part in passes)
        return "tokens", self.limit.tokens, max(tokens // 2, 1)

    def _reduce(self, smaller: tuple[str, int, int], step: int, peak_bytes: int) -> None:
        unit, previous, limit = smaller
        self.progress.pass_limits[unit] = limit
        self.reporter.emit(
            event_pb2.MicroBatchReducedEvent(
                step=step, unit=unit, previous_limit=previous, limit=limit, peak_memory_bytes=peak_bytes
            )
        )
