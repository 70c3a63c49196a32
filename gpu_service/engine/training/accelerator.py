"""Makes the accelerate object of one run, or what stands for it on the fast path. Knows nothing of training."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch


def make_accelerator(device: torch.device, compute_dtype: torch.dtype) -> Any:
    """An Accelerator for one run on `device`, in mixed precision unless `compute_dtype` is float32.

    accelerate keeps one state a process and refuses another precision; an engine outlives a run, so the state of the
    run before is cleared first.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    # accelerate takes the machine's first device unless its environment names one.
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[compute_dtype]
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision)


class LeanAccelerator:
    """What the loop asks of accelerate, for a model that computes in its own types: nothing is cast, wrapped or scaled.

    Imports no library; accelerate takes others along.
    """

    scaler = None

    def __init__(self, device: torch.device, compute_dtype: torch.dtype) -> None:
        self.device = device
        self._compute_dtype = compute_dtype
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def prepare(self, made: Any) -> Any:
        """It as it is."""
        return made

    def unwrap_model(self, model: Any) -> Any:
        """It as it is."""
        return model

    def autocast(self) -> Any:
        """Mixed precision for whatever is not the fast path's own."""
        if self._compute_dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self._compute_dtype)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
        """The norm before clipping."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
