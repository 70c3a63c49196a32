"""`nf4`:

bitsandbytes' 4-bit layers with the normal-float code. Builds the config only; transformers makes the layers.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig

IS_QUANTIZED = True


def build_config(*, double_quantization: bool, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers needs; `compute_dtype` is the type that matrix products run in."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def count_quantized(model: torch.nn.Module) -> int:
    """Layers that are held in 4 bits."""
    return sum(isinstance(module, Linear4bit) for module in model.modules())
