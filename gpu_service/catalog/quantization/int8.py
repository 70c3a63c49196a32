"""The catalog's `int8`: facts only, the layers are made by its builder in the engine."""

from gpu_service.catalog.quantization.entry import QuantizationEntry

ENTRY = QuantizationEntry(
    id="int8",
    description="8-bit integers with outliers kept apart (LLM.int8)",
    builder="gpu_service.engine.builders.quantization.int8",
    bits=8,
    supports_double_quantization=False,
    block_size=None,
    devices=("cuda", "cpu"),
    requires=("bitsandbytes",),
)
