"""The catalog's `full`: every weight is trained."""

from gpu_service.catalog.methods.entry import MethodEntry

ENTRY = MethodEntry(
    id="full",
    description="every weight of the base",
    builder="gpu_service.engine.builders.methods.full",
    low_memory_builder="gpu_service.engine.builders.methods.full_low_memory",
    quantizations=("none",),
    trains_adapter=False,
    default_learning_rate=2e-5,
    aliases=("standard",),
)
