"""`int8`:

bitsandbytes' 8-bit layers with outlier columns apart. Builds the config only; transformers makes the layers.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear8bitLt
from transformers import BitsAndBytesConfig

IS_QUANTIZED = True


def build_config(*, double_quantization: bool, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers needs. Both options are of 4-bit layers only; the planner has refused or explained them."""
    del double_quantization, compute_dtype
    return BitsAndBytesConfig(load_in_8bit=True)


def count_quantized(model: torch.nn.Module) -> int:
    """Layers that are held in 8 bits."""
    return sum(isinstance(module, Linear8bitLt) for module in model.modules())
