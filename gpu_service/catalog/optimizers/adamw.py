"""The catalog's `adamw`: Adam with decoupled weight decay, two float32 moments per parameter."""

from gpu_service.catalog.optimizers.entry import OptimizerEntry

ENTRY = OptimizerEntry(
    id="adamw",
    description="Adam with decoupled weight decay",
    builder="gpu_service.engine.builders.optimizers.adamw",
    state_bytes_per_parameter=8,
    devices=("cuda", "cpu"),
)
