"""What an engine keeps between runs: the base on the device and the tokenizer that was read last, and when each may be
used again; whether kernels can be compiled. Holds at most one of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.engine.fast_path import kernel_problems
from gpu_service.engine.loading.work import BaseKey, HeldBase
from gpu_service.engine.tokenizer_shelf import TokenizerShelf


@dataclass(kw_only=True)
class ResidentBase(HeldBase):
    """A frozen base without adapter. `num_bytes` is what it holds in memory."""

    key: BaseKey
    base_model: str
    stored_dtype: Any
    num_bytes: int

    def describe(self) -> dict[str, Any]:
        """What the shim and the server are told."""
        return {
            "base_model": self.base_model,
            "weights_digest": self.key.weights_digest,
            "quantization": self.key.quantization,
            "bytes": self.num_bytes,
        }


class BaseShelf:
    """Room for one resident base, and for a tokenizer."""

    def __init__(self) -> None:
        self.tokenizers = TokenizerShelf()
        self._base: ResidentBase | None = None
        # Why kernels cannot be compiled on the engine's device, empty where they can; None: not known yet.
        self.kernel_problem: str | None = None

    def find_kernel_problem(self, device: torch.device) -> str:
        """Why they cannot be, found out now where nobody knows. Empty too where it cannot be found out: whoever asks
        next finds out.
        """
        if self.kernel_problem is None:
            self.kernel_problem = kernel_problems.find_problem(device)
        return self.kernel_problem or ""

    def take(self, key: BaseKey) -> ResidentBase | None:
        """Take the base off the shelf when it is the one that `key` names; any other is dropped first.

        Between `take` and `put` the shelf is empty, so a run that fails leaves nothing behind.
        """
        base, self._base = self._base, None
        return base if base is not None and base.key == key else None

    def put(self, base: ResidentBase) -> None:
        """Keep `base` for the next run."""
        self._base = base

    def describe(self) -> dict[str, Any]:
        """The resident base in words; empty when there is none."""
        return {} if self._base is None else self._base.describe()


def held_bytes(model: Any) -> int:
    """Memory that a model's tensors hold: parameters, buffers, and what a quantization keeps beside them."""
    storages: dict[int, int] = {}
    for tensor in _tensors(model):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(model: Any) -> Iterator[torch.Tensor]:
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        # bitsandbytes: scales of blocks, which may be quantized themselves (4 bits), or of rows (8 bits).
        state = getattr(parameter, "quant_state", None)
        for holder in (parameter, state, getattr(state, "state2", None)):
            for name in ("CB", "SCB", "absmax", "code", "offset"):
                value = getattr(holder, name, None)
                if isinstance(value, torch.Tensor):
                    yield value
