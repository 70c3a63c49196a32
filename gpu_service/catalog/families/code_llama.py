"""The catalog's `code_llama` family."""

from gpu_service.catalog.families.entry import FamilyEntry

ENTRY = FamilyEntry(
    id="code_llama",
    description="CodeLlama, whose config says llama",
    builder="gpu_service.engine.builders.families.code_llama",
    config_types=("llama",),
    config_class="LlamaConfig",
    architecture="LlamaForCausalLM",
    has_fast_path=True,
)
