"""The catalog's `qwen2` family."""

from gpu_service.catalog.families.entry import FamilyEntry

ENTRY = FamilyEntry(
    id="qwen2",
    description="Qwen2 and Qwen2.5",
    builder="gpu_service.engine.builders.families.qwen2",
    config_types=("qwen2",),
    config_class="Qwen2Config",
    architecture="Qwen2ForCausalLM",
    has_fast_path=True,
)
