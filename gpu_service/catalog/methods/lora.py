"""The catalog's `lora`: a low-rank adapter over the base as it is."""

from gpu_service.catalog.methods.entry import MethodEntry

ENTRY = MethodEntry(
    id="lora",
    description="low-rank adapter over a frozen base",
    builder="gpu_service.engine.builders.methods.lora",
    quantizations=("none",),
    trains_adapter=True,
    default_learning_rate=2e-4,
)
