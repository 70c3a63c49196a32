"""Model families by id: the `model_type` that a project names."""

from collections.abc import Mapping
from types import MappingProxyType

from gpu_service.catalog.families import code_llama, gemma3, llama, mistral, phi3, qwen2, qwen3
from gpu_service.catalog.families.entry import FamilyEntry

REGISTRY: Mapping[str, FamilyEntry] = MappingProxyType(
    {
        "llama": llama.ENTRY,
        "code_llama": code_llama.ENTRY,
        "mistral": mistral.ENTRY,
        "qwen2": qwen2.ENTRY,
        "qwen3": qwen3.ENTRY,
        "gemma3": gemma3.ENTRY,
        "phi3": phi3.ENTRY,
    }
)
