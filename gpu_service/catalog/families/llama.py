"""The catalog's `llama` family."""

from gpu_service.catalog.families.entry import FamilyEntry

ENTRY = FamilyEntry(
    id="llama",
    description="Llama 1 to 3, SmolLM2 and others of the same shape",
    builder="gpu_service.engine.builders.families.llama",
    config_types=("llama",),
    config_class="LlamaConfig",
    architecture="LlamaForCausalLM",
    has_fast_path=True,
)
