"""One pass over flat tokens, as autograd and evaluations ask for it: here, kernel by kernel.

`recorded_pass` has the same as recordings; which of the two a pass is, `graphs` decides.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

import torch

from gpu_service.engine.fast_path.decoder import Decoder, FlatPass, KeptPass
from gpu_service.engine.fast_path.dropout import Dropout


class Kind(Enum):
    """What a pass is for, in words for people."""

    TRAINED = "training passes"
    # Forward alone, as evaluations and references are.
    MEASURED = "measured passes"
    MEASURED_BASE = "measured passes of the base"


class Pass(Protocol):
    """One pass, forward and then back, each once."""

    def forward(self) -> torch.Tensor:
        """Nats of each target, float32 [K]; valid until the next pass."""
        ...

    def backward(self, upstream: torch.Tensor) -> torch.Tensor:
        """The gradient of the flat buffer, float32; `upstream` [K] is that of the nats."""
        ...


class LaunchedPass:
    """Kernel by kernel."""

    def __init__(self, decoder: Decoder, dropout: Dropout, flat: FlatPass, num_weights: int) -> None:
        """`num_weights` is the size of the flat buffer."""
        self._decoder, self._dropout, self._flat = decoder, dropout, flat
        self._num_weights = num_weights
        self._kept: KeptPass | None = None

    def forward(self) -> torch.Tensor:
        self._dropout.key = self._flat.key
        nats, self._kept = self._decoder.forward(self._flat, adapted=True, keeps=True)
        return nats

    def backward(self, upstream: torch.Tensor) -> torch.Tensor:
        gradients = self._decoder.embedding.new_empty(self._num_weights)
        self.write_gradients(upstream, gradients)
        return gradients.float()

    def write_gradients(self, upstream: torch.Tensor, gradients: torch.Tensor) -> None:
        """`backward` into a buffer in the compute type."""
        kept, self._kept = self._kept, None
        assert kept is not None
        self._dropout.key = self._flat.key
        self._decoder.backward(upstream, self._flat, kept, gradients)


def measure(decoder: Decoder, dropout: Dropout, flat: FlatPass, kind: Kind) -> torch.Tensor:
    """A pass of a measured kind, kernel by kernel: nats of each target, float32 [K]."""
    dropout.key = None
    nats, _ = decoder.forward(flat, adapted=kind is Kind.MEASURED, keeps=False)
    return nats
