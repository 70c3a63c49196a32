"""The catalog's `mistral` family."""

from gpu_service.catalog.families.entry import FamilyEntry

ENTRY = FamilyEntry(
    id="mistral",
    description="Mistral 7B and others of its shape",
    builder="gpu_service.engine.builders.families.mistral",
    config_types=("mistral",),
    config_class="MistralConfig",
    architecture="MistralForCausalLM",
    has_fast_path=True,
)
