"""What is worth knowing of a plan that can be trained. Refuses nothing: `plan` does."""

from gpu_service.catalog.base_models import BaseModel
from gpu_service.catalog.methods.entry import MethodEntry
from gpu_service.domain.defaults import FP8, LOW, ResolvedHyperparameters, ResolvedMix
from gpu_service.domain.device import Device
from gpu_service.domain.memory_estimate import MemoryEstimate
from gpu_service.domain.spec import TrainingSpec

# Said at level CHECK only; the exact plan knows the longest example and refuses instead.
TOO_LONG_WARNING = (
    "examples of max_length would not fit the device's memory; the exact plan measures the longest there is"
)
TOKEN_MIX_WARNING = (
    "the mix counts tokens, which only the exact plan reads: examples and steps are upper bounds, tokens are not known"
)
TOKEN_BATCH_WARNING = "a batch counts tokens, which only the exact plan reads: steps are an upper bound"
FP8_WARNING = (
    "compute 'fp8' rounds frozen weights, activations and gradients to 8 bits in every product with the base but those "
    "of the first two blocks and the last, where there are eight or more: other numerics than bfloat16's; losses come "
    "near, and are not the same"
)
LOW_WARNING = (
    "full_memory 'low' holds weights in bfloat16 and moments in 8 bits, both rounded by chance: other numerics "
    "than float32's; losses come near, and are not the same"
)
CHECK_WARNINGS = frozenset({TOO_LONG_WARNING, TOKEN_MIX_WARNING, TOKEN_BATCH_WARNING})


def list_warnings(
    spec: TrainingSpec,
    base_model: BaseModel,
    method: MethodEntry,
    resolved: ResolvedHyperparameters,
    mix: ResolvedMix,
    memory: MemoryEstimate,
    device: Device,
) -> list[str]:
    """Texts for people, in a fixed order."""
    formats = {reference.format for reference in spec.datasets}
    joined = [name for name in ("prompt-completion", "instruction") if name in formats]
    smallest = min((min(layer.in_features, layer.out_features) for layer in base_model.linear_layers), default=0)
    has_template = bool(resolved.chat_template or base_model.has_chat_template)
    checks = (
        (spec.training_type != method.id, f"training type {spec.training_type!r} means {method.id!r}"),
        (
            not method.trains_adapter and spec.hyperparameters.lora != type(spec.hyperparameters.lora)(),
            f"the lora settings mean nothing for training type {method.id!r}",
        ),
        (
            resolved.lora is not None and resolved.lora.rank > smallest,
            f"the adapter's rank is larger than the smallest side of a covered layer ({smallest})",
        ),
        (
            bool(resolved.chat_template) and base_model.has_chat_template,
            f"catalog template {resolved.chat_template!r} is used in place of the base model's own",
        ),
        (
            bool(joined and has_template),
            f"{' and '.join(joined)} data is rendered with the chat template as one user turn and one assistant turn",
        ),
        (
            resolved.objective != "dpo" and spec.hyperparameters.dpo != type(spec.hyperparameters.dpo)(),
            f"the dpo settings mean nothing for objective {resolved.objective!r}",
        ),
        (
            bool(device.total_memory_bytes) and memory.total_bytes > device.total_memory_bytes,
            TOO_LONG_WARNING,
        ),
        (resolved.compute == FP8, FP8_WARNING),
        (resolved.full_memory == LOW, LOW_WARNING),
        (mix.unit != "examples", TOKEN_MIX_WARNING),
        (resolved.batch.tokens is not None, TOKEN_BATCH_WARNING),
        (
            bool(device.free_memory_bytes) and memory.standing_bytes > device.free_memory_bytes,
            f"{device.name} has less free memory just now than the run needs",
        ),
    )
    return [text for holds, text in checks if holds]
