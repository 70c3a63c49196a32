"""The catalog's `paged-adamw-8bit`: `adamw-8bit` whose moments may leave the device while memory is short."""

from gpu_service.catalog.optimizers.entry import OptimizerEntry

ENTRY = OptimizerEntry(
    id="paged-adamw-8bit",
    description="AdamW with moments of 8 bits, paged to the host when the device is full",
    builder="gpu_service.engine.builders.optimizers.paged_adamw_8bit",
    state_bytes_per_parameter=2 + 2 * 4 / 256,
    # A CPU has nothing to page to.
    devices=("cuda",),
    requires=("bitsandbytes",),
)
