"""Which kernels make and use gradients of weights on a device: Triton's on CUDA, references in plain torch elsewhere.

The counterpart of `operations` for what full training has besides. Both modules have the same functions with the same
arguments, which `full_reference` documents.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch


def full_operations_for(device: torch.device) -> Any:
    """The module of kernels for `device`. Triton is imported on CUDA only: builds for CPUs have none."""
    name = "full_kernels" if device.type == "cuda" else "full_reference"
    return import_module(f"gpu_service.engine.fast_path.{name}")
