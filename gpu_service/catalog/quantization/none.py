"""The catalog's `none`: the base stays in its compute type."""

from gpu_service.catalog.quantization.entry import QuantizationEntry

ENTRY = QuantizationEntry(
    id="none",
    description="not quantized",
    builder="gpu_service.engine.builders.quantization.none",
    bits=None,
    supports_double_quantization=False,
    block_size=None,
    devices=("cuda", "cpu"),
)
