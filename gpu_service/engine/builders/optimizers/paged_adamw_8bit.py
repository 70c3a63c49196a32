"""`paged-adamw-8bit`: bitsandbytes' AdamW with moments of 8 bits in memory that the driver moves to the host when the
device is full.

bitsandbytes 0.50.2 never frees such memory, and a state that it loads is paged no more; an engine outlives a run and
goes on from checkpoints, so both are put right here.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim import PagedAdamW8bit

from gpu_service.engine.builders.optimizers.parameter_groups import group
from tunesmith.common.v1 import training_spec_pb2

_MOMENTS = ("state1", "state2")
# Below this many elements bitsandbytes does not page either.
_MIN_PAGED_ELEMENTS = 100_000
_DRIVER_LIBRARY = "libcuda.so.1"


class _PagedAdamW8bit(PagedAdamW8bit):
    """Frees its pages with its tensors, and pages what it loads."""

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Zeros of `p`'s shape, paged when large. On the device's default stream."""
        if p.numel() < _MIN_PAGED_ELEMENTS:
            return torch.zeros_like(p, dtype=dtype)
        buffer: torch.Tensor = functional.get_paged(*p.shape, dtype=dtype, device=p.device)
        finalizer = weakref.finalize(buffer, _free, buffer.data_ptr(), p.device)
        # The driver frees what a process that ends still has.
        finalizer.atexit = False
        functional.fill(buffer, 0)
        return buffer

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """As bitsandbytes does it; then large moments are put into pages."""
        super().load_state_dict(state_dict, move_to_device=False)
        for parameter, state in self.state.items():
            for name, value in state.items():
                if not isinstance(value, torch.Tensor):
                    continue
                if name in _MOMENTS:
                    buffer = self.get_state_buffer(parameter, dtype=value.dtype)
                    # The host writes into a page next, which the device may still be filling.
                    torch.cuda.synchronize(parameter.device)
                    state[name] = buffer.copy_(value)
                elif move_to_device:
                    state[name] = value.to(parameter.device)


def _free(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        status = ctypes.CDLL(_DRIVER_LIBRARY).cuMemFree_v2(ctypes.c_uint64(address))
    if status != 0:
        raise RuntimeError(f"the driver did not free the optimizer's pages: status {status}")


def build(parameters: Iterable[torch.nn.Parameter], settings: training_spec_pb2.Optimizer) -> torch.optim.Optimizer:
    """The optimizer over `parameters`; the schedule sets the learning rate before each step."""
    optimizer: torch.optim.Optimizer = _PagedAdamW8bit(
        group(parameters, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )
    return optimizer
