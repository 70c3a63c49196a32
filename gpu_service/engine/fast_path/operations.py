"""Which kernels a device runs: Triton's on CUDA, their references in plain torch elsewhere.

The device alone decides. Both modules have the same functions with the same arguments, which `torch_reference`
documents. Keeps two threads from having kernels compiled at once.
"""

from __future__ import annotations

import threading
from importlib import import_module
from typing import Any

import torch

# Held by whoever launches kernels to have them compiled, while a second thread may: Triton looks for what is compiled
# without a lock of its own, and both would do the work.
first_launches = threading.Lock()


def operations_for(device: torch.device) -> Any:
    """The module of kernels for `device`. Triton is imported on CUDA only: builds for CPUs have none."""
    name = "triton_kernels" if device.type == "cuda" else "torch_reference"
    return import_module(f"gpu_service.engine.fast_path.{name}")
