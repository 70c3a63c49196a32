"""Training methods by id, and by alias through `find`."""

from collections.abc import Mapping
from types import MappingProxyType

from gpu_service.catalog.methods import full, lora, qlora
from gpu_service.catalog.methods.entry import MethodEntry

REGISTRY: Mapping[str, MethodEntry] = MappingProxyType(
    {
        "qlora": qlora.ENTRY,
        "lora": lora.ENTRY,
        "full": full.ENTRY,
    }
)


def find(training_type: str) -> MethodEntry | None:
    """The entry of this id or alias, None if there is none."""
    if training_type in REGISTRY:
        return REGISTRY[training_type]
    return next((entry for entry in REGISTRY.values() if training_type in entry.aliases), None)
