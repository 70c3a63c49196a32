"""Where the gradients of trained weights go, part by part, as a backward pass makes them.

`GatheredGradients` keeps them all until the step: passes add up, and the whole is clipped before it is used. Whoever
makes a gradient asks for its place, writes or adds as it is told, and says when that part is complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from gpu_service.engine.fast_path.full_weights import Region

# Elements whose squares are added at a time: indices within stay below 2^31.
_SQUARED_ELEMENTS = 2**30


@dataclass(frozen=True, kw_only=True)
class Place:
    """Memory for a gradient. `adds`: what is in it stays, and is added to."""

    tensor: torch.Tensor
    adds: bool


@dataclass(frozen=True, kw_only=True)
class EarlyPlace:
    """Memory for a gradient that a forward pass makes already; `number` is its own."""

    tensor: torch.Tensor
    number: int


class Gradients(Protocol):
    """Of one model; regions are those of its flat buffers."""

    def place_early(self, region: Region) -> EarlyPlace | None:
        """Where a forward pass may write the region's gradient, up to a factor; None where it may not."""
        ...

    def is_whole(self, early: EarlyPlace) -> bool:
        """Whether what was written there is still what is in it, and all that is."""
        ...

    def begin(self) -> None:
        """A backward pass begins."""
        ...

    def place(self, region: Region) -> Place:
        """Where the region's gradient goes; asked for again in the same pass, it is added to."""
        ...

    def complete(self, region: Region) -> None:
        """This pass makes no more of the region's gradient."""
        ...

    def end(self) -> None:
        """The backward pass is over, every region complete."""
        ...


class GatheredGradients:
    """All of a step's, in one flat buffer. `dtype` float32 where a step has several passes, else the compute type."""

    def __init__(self, num_elements: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.flat = torch.zeros(num_elements, device=device, dtype=dtype)
        # An earlier pass of the step is in the buffer.
        self._holds_pass = False
        self._begun: set[int] = set()
        self._num_early = 0

    def place_early(self, region: Region) -> EarlyPlace | None:
        if self._holds_pass:
            return None
        self._num_early += 1
        return EarlyPlace(tensor=region.view(self.flat), number=self._num_early)

    def is_whole(self, early: EarlyPlace) -> bool:
        return not self._holds_pass and early.number == self._num_early

    def begin(self) -> None:
        self._begun = set()

    def place(self, region: Region) -> Place:
        adds = self._holds_pass or region.start in self._begun
        self._begun.add(region.start)
        return Place(tensor=region.view(self.flat), adds=adds)

    def complete(self, region: Region) -> None:
        """Nothing: the step takes them together."""

    def end(self) -> None:
        self._holds_pass = True

    def hold_in(self, dtype: torch.dtype) -> None:
        """Between steps, with nothing gathered. Stays as it is where that raises torch.OutOfMemoryError."""
        before, num_elements, device = self.flat.dtype, self.flat.numel(), self.flat.device
        # Never both.
        self.flat = torch.empty(0, device=device, dtype=before)
        try:
            self.flat = torch.zeros(num_elements, device=device, dtype=dtype)
        finally:
            if len(self.flat) != num_elements:
                self.flat = torch.zeros(num_elements, device=device, dtype=before)

    @property
    def is_empty(self) -> bool:
        return not self._holds_pass

    def drop(self) -> None:
        """The next pass is a step's first; what is in the buffer is written over."""
        self._holds_pass = False

    def norm(self) -> torch.Tensor:
        """Of all of them: float32, a scalar on the device. Zero before any pass."""
        if self.is_empty:
            return torch.zeros((), device=self.flat.device)
        parts = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in self.flat.split(_SQUARED_ELEMENTS)]
        return torch.linalg.vector_norm(torch.stack(parts))
