"""The catalog's `qwen3` family."""

from gpu_service.catalog.families.entry import FamilyEntry

ENTRY = FamilyEntry(
    id="qwen3",
    description="Qwen3, dense",
    builder="gpu_service.engine.builders.families.qwen3",
    config_types=("qwen3",),
    config_class="Qwen3Config",
    architecture="Qwen3ForCausalLM",
    has_fast_path=True,
)
