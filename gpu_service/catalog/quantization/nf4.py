"""The catalog's `nf4`: facts only, the layers are made by its builder in the engine."""

from gpu_service.catalog.quantization.entry import QuantizationEntry

ENTRY = QuantizationEntry(
    id="nf4",
    description="4-bit normal float, scales per block of 64",
    builder="gpu_service.engine.builders.quantization.nf4",
    bits=4,
    supports_double_quantization=True,
    block_size=64,
    devices=("cuda", "cpu"),
    requires=("bitsandbytes",),
)
