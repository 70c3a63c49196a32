"""The catalog's `gemma3` family."""

from gpu_service.catalog.families.entry import FamilyEntry

ENTRY = FamilyEntry(
    id="gemma3",
    description="Gemma 3, text only",
    builder="gpu_service.engine.builders.families.gemma3",
    config_types=("gemma3_text",),
    config_class="Gemma3TextConfig",
    architecture="Gemma3ForCausalLM",
)
