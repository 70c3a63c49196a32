"""The catalog's `adamw-8bit`: AdamW whose two moments are one byte each, with a float32 scale for every 256."""

from gpu_service.catalog.optimizers.entry import OptimizerEntry

ENTRY = OptimizerEntry(
    id="adamw-8bit",
    description="AdamW with moments of 8 bits; those of tensors below 4,096 elements are float32",
    builder="gpu_service.engine.builders.optimizers.adamw_8bit",
    state_bytes_per_parameter=2 + 2 * 4 / 256,
    devices=("cuda", "cpu"),
    requires=("bitsandbytes",),
)
