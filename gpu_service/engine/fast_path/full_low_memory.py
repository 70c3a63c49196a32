"""Full training in little memory: no gradient is kept. The backward pass runs twice, each time letting go of a weight's
gradient as soon as it is made: once for the norm of them all, once for the step.

So clipping, and leaving out a step that is not finite, are what they are elsewhere: nothing is changed before the whole
norm is known. Every block is recomputed whole. A step must be one pass: gradients of several would have to be kept, and
a second one is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.engine.fast_path.decoder import FlatPass
from gpu_service.engine.fast_path.full_decoder import KeptFullPass
from gpu_service.engine.fast_path.full_head import Upstream
from gpu_service.engine.fast_path.full_model import FullModel
from gpu_service.engine.fast_path.full_weights import Region
from gpu_service.engine.fast_path.weight_gradients import EarlyPlace, Place

Consumer = Callable[[Region, torch.Tensor], None]


class ConsumedGradients:
    """One region's at a time, but for those that are completed later, as a table that is embedding and head."""

    def __init__(self, *, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._open: dict[int, torch.Tensor] = {}
        self.consume: Consumer | None = None

    def place_early(self, region: Region) -> None:
        """Nowhere: nothing is kept."""

    def is_whole(self, early: EarlyPlace) -> bool:
        return False

    def begin(self) -> None:
        # What a pass that failed left.
        self._open = {}

    def place(self, region: Region) -> Place:
        known = self._open.get(region.start)
        if known is not None:
            return Place(tensor=known, adds=True)
        # Freed and asked for again, the allocator gives the same memory.
        made = torch.empty(region.shape, device=self._device, dtype=self._dtype)
        self._open[region.start] = made
        return Place(tensor=made, adds=False)

    def complete(self, region: Region) -> None:
        assert self.consume is not None
        self.consume(region, self._open.pop(region.start))

    def end(self) -> None:
        assert not self._open, "a gradient was never completed"


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A forward pass whose backward pass is still to be made."""

    upstream: Upstream
    flat: FlatPass
    kept: KeptFullPass


class LowMemoryModel(FullModel):
    """Weights are held in the compute type. What `backward` asks for is made when the optimizer wants it."""

    def _make_gradients(self) -> Any:
        self._pending: _Pending | None = None
        return ConsumedGradients(device=self._settings.device, dtype=self._settings.compute_dtype)

    def carry_back(self, upstream: Upstream, flat: FlatPass, kept: KeptFullPass) -> None:
        """Remember the pass. Raises torch.OutOfMemoryError for a second one: passes were made smaller."""
        if self._pending is not None:
            raise torch.OutOfMemoryError(
                "gradients are not kept, so a step must be one pass, which the device's memory does not hold"
            )
        self._pending = _Pending(upstream=upstream, flat=flat, kept=kept)

    def sweep(self, consume: Consumer, *, is_last: bool) -> None:
        """Make every gradient, each of which is `consume`'s for a moment: it may change the weights it is of.

        Does nothing without a pass to go back through.
        """
        if self._pending is None:
            return
        one = self._pending
        self.gradients.consume = consume
        try:
            self._decoder.backward(one.upstream, one.flat, one.kept, is_last=is_last)
        finally:
            self.gradients.consume = None
        if is_last:
            self._pending = None

    def drop(self) -> None:
        """Forget the pass."""
        self._pending = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no pass to go back through."""
        return self._pending is None

    def prepare_adding_up(self) -> str:
        """Nothing: a second pass is refused."""
        return ""

    def narrow_gradients(self) -> str:
        """Nothing: none are kept."""
        return ""

    def recompute_more(self) -> str:
        """Nothing: all is recomputed."""
        return ""

    def release(self) -> None:
        self._pending = None
        super().release()
