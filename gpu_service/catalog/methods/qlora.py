"""The catalog's `qlora`: a low-rank adapter over a quantized base."""

from gpu_service.catalog.methods.entry import MethodEntry

ENTRY = MethodEntry(
    id="qlora",
    description="low-rank adapter over a quantized, frozen base",
    builder="gpu_service.engine.builders.methods.qlora",
    quantizations=("nf4", "fp4", "int8"),
    trains_adapter=True,
    default_learning_rate=2e-4,
)
