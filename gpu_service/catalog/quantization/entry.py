"""What a quantization entry says of itself, for cross-option checks and memory estimates."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QuantizationEntry:
    """`builder` is a module of the engine; `bits` is per weight of a linear layer, None for not quantized."""

    id: str
    description: str
    builder: str
    bits: int | None
    supports_double_quantization: bool
    # Weights that share one scale; None when a whole row shares one.
    block_size: int | None
    devices: tuple[str, ...]
    # Distributions that must be installed.
    requires: tuple[str, ...] = ()
