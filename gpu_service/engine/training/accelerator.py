"""Makes the accelerate object of one run. Knows its global state, and nothing of training."""

from __future__ import annotations

import os
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
