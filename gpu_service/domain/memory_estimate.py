"""Predicted device memory of a run, by arithmetic on shapes. Measures nothing and refuses nothing."""

import math
from dataclasses import dataclass

from gpu_service.catalog.base_models import BaseModel
from gpu_service.catalog.quantization.entry import QuantizationEntry
from gpu_service.domain.defaults import ResolvedHyperparameters

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_TRAINED_BYTES = 4  # trained weights and their gradients are float32
_LOGITS_COPIES = 2  # the logits in float32 and their gradient
# Per token and layer: values kept for the backward pass, in multiples of hidden and of intermediate size.
_HIDDEN_COPIES = 10
_INTERMEDIATE_COPIES = 4
# Library and driver context, fragmentation: fixed on CUDA, none worth counting on a CPU, plus a twentieth of the rest.
_CUDA_CONTEXT_BYTES = 600 * 1024**2
_CPU_CONTEXT_BYTES = 300 * 1024**2


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes; `activations_bytes` is for the largest forward and backward pass that the plan allows."""

    weights_bytes: int
    adapter_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(vars(self).values())

    @property
    def standing_bytes(self) -> int:
        """All but the activations: what is needed however short the data is."""
        return self.total_bytes - self.activations_bytes

    def to_json(self) -> dict[str, str]:
        """`MemoryEstimate` as proto JSON."""
        return {**{name: str(number) for name, number in vars(self).items()}, "total_bytes": str(self.total_bytes)}


def estimate_memory(
    base: BaseModel,
    resolved: ResolvedHyperparameters,
    quantization: QuantizationEntry,
    *,
    num_trainable_parameters: int,
    optimizer_state_bytes: float,
    longest_tokens: int,
    device_type: str,
) -> MemoryEstimate:
    """`longest_tokens` is the longest example's length, or max_length when no example was read."""
    adapter = resolved.lora is not None
    compute_bytes = DTYPE_BYTES[resolved.quantization.compute_dtype]
    weights = _weights_bytes(base, resolved, quantization, compute_bytes if adapter else _TRAINED_BYTES)
    trained = _TRAINED_BYTES * num_trainable_parameters
    activations = _activations_bytes(base, resolved, compute_bytes, longest_tokens)
    context = _CUDA_CONTEXT_BYTES if device_type == "cuda" else _CPU_CONTEXT_BYTES
    return MemoryEstimate(
        weights_bytes=weights,
        adapter_bytes=trained if adapter else 0,
        gradients_bytes=trained,
        optimizer_bytes=math.ceil(optimizer_state_bytes * num_trainable_parameters),
        activations_bytes=activations,
        overhead_bytes=context + weights // 20,
    )


def _weights_bytes(
    base: BaseModel, resolved: ResolvedHyperparameters, quantization: QuantizationEntry, plain_bytes: int
) -> int:
    linear = base.num_linear_parameters
    plain = (base.num_parameters - linear) * plain_bytes
    if quantization.bits is None:
        return plain + linear * plain_bytes
    packed = linear * quantization.bits // 8
    if quantization.block_size is None:  # one float32 scale a row
        return plain + packed + 4 * sum(layer.out_features for layer in base.linear_layers)
    scales = linear // quantization.block_size
    # A scale is float32, or one byte and a float32 for every 256 scales when the scales are quantized too.
    return plain + packed + (scales + scales // 64 if resolved.quantization.double_quantization else 4 * scales)


def _activations_bytes(
    base: BaseModel, resolved: ResolvedHyperparameters, compute_bytes: int, longest_tokens: int
) -> int:
    tokens = (resolved.batch.micro_batch_examples or 1) * longest_tokens
    layer = _HIDDEN_COPIES * base.hidden_size + _INTERMEDIATE_COPIES * base.intermediate_size
    recomputed = base.num_layers * base.hidden_size + layer
    kept = recomputed if resolved.gradient_checkpointing else base.num_layers * layer
    logits = base.vocabulary_size * (compute_bytes + 4 * _LOGITS_COPIES)
    return tokens * (kept * compute_bytes + logits)
