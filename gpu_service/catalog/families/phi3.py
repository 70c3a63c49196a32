"""The catalog's `phi3` family."""

from gpu_service.catalog.families.entry import FamilyEntry

ENTRY = FamilyEntry(
    id="phi3",
    description="Phi-3 and Phi-4 mini",
    builder="gpu_service.engine.builders.families.phi3",
    config_types=("phi3",),
    config_class="Phi3Config",
    architecture="Phi3ForCausalLM",
)
