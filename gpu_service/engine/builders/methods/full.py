"""`full`: every weight of the base is trained, in float32. Nothing stays resident: the base is no base any more."""

from __future__ import annotations

from typing import Any

import torch

from gpu_service.engine.builders.methods.lora import set_gradient_checkpointing
from tunesmith.common.v1 import training_spec_pb2

TRAINS_ADAPTER = False


def base_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Weights that are trained are held in float32; products may still run in `compute_dtype`."""
    del compute_dtype
    return torch.float32


def prepare_base(model: Any) -> None:
    """Nothing: there is no frozen base."""
    del model


def attach(base: Any, base_model: str, hyperparameters: training_spec_pb2.Hyperparameters) -> Any:
    """The base itself, every parameter trainable."""
    base.name_or_path = base_model
    set_gradient_checkpointing(base, hyperparameters.gradient_checkpointing)
    base.requires_grad_(True)
    return base


def count_covered(model: Any) -> int:
    """No layer has an adapter."""
    del model
    return 0


def detach(model: Any) -> None:
    """Nothing can stay: the weights are the trained ones."""
    del model
