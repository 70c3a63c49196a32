"""`none`: weights stay as they are. There is nothing to build."""

from __future__ import annotations

import torch

IS_QUANTIZED = False


def build_config(*, double_quantization: bool, compute_dtype: torch.dtype) -> None:
    """No config: transformers loads the plain layers."""
    del double_quantization, compute_dtype


def count_quantized(model: torch.nn.Module) -> int:
    """No layer is quantized."""
    del model
    return 0
