"""The end of a step: is its gradient finite, does it reach the weights, and when does the host read the numbers.

On the host: the numbers are read first, and decide. On the device: the decision is a flag that the optimizer reads
there, so that the host may hand out the next step before it has read the numbers of this one. Both decide alike; a
step that is left out changes neither weights nor moments. Reports nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

# Steps that are handed to the device before the numbers of an earlier one are read.
_STEPS_AHEAD = 1


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """What a step came to, on the host: the objective's values [examples, columns] and the gradient's norm before
    clipping. A step of which `is_finite` is False was left out; `updated` says whether the weights changed.
    """

    rows: list[list[float]]
    norm: float
    is_finite: bool
    updated: bool
    seconds: float


@runtime_checkable
class LeavesOutSteps(Protocol):
    """An optimizer whose steps do nothing while a flag on the device says so."""

    def leave_out(self, flag: torch.Tensor) -> None:
        """`flag` is a float32 scalar on the device: 1 leaves steps out, counters and all; 0 makes them."""
        ...


class Updates(Protocol):
    """How steps of one training end. `steps_ahead` may be in hand while the numbers of one are not read."""

    steps_ahead: int

    def begin(self) -> None:
        """A step begins, its first kernel is not handed out yet."""
        ...

    def apply(self, values: Sequence[torch.Tensor], norm: torch.Tensor, weight: int) -> Callable[[], StepNumbers]:
        """Let the clipped gradient into the weights if the step is finite, and drop it. What is given waits for that.

        `values` are those of the step's passes, `norm` a scalar, both on the device; `weight` is what the loss is
        divided by. A step without any weight has no mean, and counts as one that is not finite.
        """
        ...


class UpdatesOnHost:
    """For every optimizer and device. The host waits once a step."""

    steps_ahead = 0

    def __init__(self, *, optimizer: Any, scaler: Any) -> None:
        """`optimizer` is accelerate's; `scaler` its gradient scaler, or None."""
        self._optimizer = optimizer
        self._scaler = scaler
        self._start = 0.0

    def begin(self) -> None:
        self._start = time.monotonic()

    def apply(self, values: Sequence[torch.Tensor], norm: torch.Tensor, weight: int) -> Callable[[], StepNumbers]:
        # The only place of a step where the host waits for the device.
        *rows, (measured_norm, *_) = _tabulate(values, norm).tolist()
        is_finite = weight > 0 and all(math.isfinite(row[0]) for row in rows)
        # A scaler finds its scale by infinite gradients, and leaves out such an update itself.
        is_finite = is_finite and (math.isfinite(measured_norm) or self._scaler is not None)
        updated = self._update(is_finite)
        numbers = StepNumbers(
            rows=rows,
            norm=measured_norm,
            is_finite=is_finite,
            updated=updated,
            seconds=time.monotonic() - self._start,
        )
        return lambda: numbers

    def _update(self, is_finite: bool) -> bool:
        if is_finite:
            self._optimizer.step()
            updated = self._scaler is None or not self._optimizer.step_was_skipped
        else:
            updated = False
            if self._scaler is not None:
                # Its gradients were unscaled for clipping; without this it would refuse to do that for the next step.
                self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return updated


class UpdatesOnDevice:
    """For an optimizer that leaves out steps by a flag. The host never waits but to read numbers that are wanted."""

    steps_ahead = _STEPS_AHEAD

    def __init__(self, *, optimizer: Any, inner: LeavesOutSteps, device: torch.device, halts: bool) -> None:
        """`inner` is the optimizer below accelerate's. `halts`: after one step that was left out, all others are."""
        self._optimizer = optimizer
        self._inner = inner
        self._clock = _CudaClock() if device.type == "cuda" else _HostClock()
        self._halted = torch.zeros((), device=device, dtype=torch.bool) if halts else None

    def begin(self) -> None:
        self._clock.begin()

    def apply(self, values: Sequence[torch.Tensor], norm: torch.Tensor, weight: int) -> Callable[[], StepNumbers]:
        table = _tabulate(values, norm)
        left_out = ~torch.isfinite(table[:, 0]).all()
        if weight == 0:
            left_out = torch.ones_like(left_out)
        if self._halted is not None:
            left_out = self._halted = self._halted | left_out
        self._inner.leave_out(left_out.float())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        table = torch.cat([table, left_out.double().expand(1, table.shape[1])])
        if table.device.type == "cuda":
            on_host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
            table = on_host.copy_(table, non_blocking=True)
        wait = self._clock.end()

        def read() -> StepNumbers:
            seconds = wait()
            *rows, (measured_norm, *_), (flag, *_) = table.tolist()
            return StepNumbers(rows=rows, norm=measured_norm, is_finite=not flag, updated=not flag, seconds=seconds)

        return read


def make_updates(*, accelerator: Any, optimizer: Any, halts: bool) -> Updates:
    """How the steps of `optimizer`, accelerate's, end on accelerate's device."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if accelerator.device.type == "cuda" and accelerator.scaler is None and isinstance(inner, LeavesOutSteps):
        return UpdatesOnDevice(optimizer=optimizer, inner=inner, device=accelerator.device, halts=halts)
    return UpdatesOnHost(optimizer=optimizer, scaler=accelerator.scaler)


class _HostClock:
    """Stands in for the device's where work is done when it is handed out."""

    def begin(self) -> None:
        self._start = time.monotonic()

    def end(self) -> Callable[[], float]:
        seconds = time.monotonic() - self._start
        return lambda: seconds


class _CudaClock:
    """Time on the device. A step begins with the end of the one before it if the device was still busy with that."""

    def __init__(self) -> None:
        self._start = self._last_end = torch.cuda.Event(enable_timing=True)

    def begin(self) -> None:
        busy = self._last_end is not self._start and not self._last_end.query()
        self._start = self._last_end
        if not busy:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()

    def end(self) -> Callable[[], float]:
        # Whoever waits for it sleeps: otherwise a core would do nothing else for most of each step.
        start, end = self._start, torch.cuda.Event(enable_timing=True, blocking=True)
        end.record()
        self._last_end = end

        def wait() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1000

        return wait


def _tabulate(values: Sequence[torch.Tensor], norm: torch.Tensor) -> torch.Tensor:
    """One row an example, and one of the norm: float64 [examples + 1, columns]."""
    return torch.cat([*values, norm.double().expand(1, values[0].shape[1])])
