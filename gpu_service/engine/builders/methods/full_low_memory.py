"""`full` in little memory: every weight of the base is trained, in the compute type. Otherwise as `full`."""

from __future__ import annotations

import torch

from gpu_service.engine.builders.methods.full import TRAINS_ADAPTER, attach, count_covered, detach, prepare_base

__all__ = ["TRAINS_ADAPTER", "attach", "base_dtype", "count_covered", "detach", "prepare_base"]


def base_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Weights are held in what they are multiplied in."""
    return compute_dtype
