"""How a run of the fast path is made to fit its device: what is recomputed, whether quantized weights stand restored.

Takes what was asked for; chooses the rest, the fastest that fits. Pure: asks an estimate, measures nothing. Refuses
settings that only the fast path has where another trains; that nothing fits at all is for the plan to refuse.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from gpu_service.domain.defaults import FP8, LOW, RESIDENT, STREAMED, ResolvedHyperparameters
from gpu_service.domain.device import Device
from gpu_service.domain.errors import refuse_user
from gpu_service.domain.memory_estimate import MemoryEstimate
from gpu_service.domain.recomputation import NOTHING, Recomputation, everything, ladder
from gpu_service.domain.spec import Hyperparameters
from gpu_service.domain.trainer import FAST

# Restored weights are a convenience: they leave this part of the device free.
_RESIDENT_PART = 0.9
_GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Settings with everything chosen, what they come to, and a sentence on the choice; empty on the plain path."""

    resolved: ResolvedHyperparameters
    memory: MemoryEstimate
    reason: str


def check_asked(
    given: Hyperparameters, *, trainer: str, trainer_reason: str, trains_base: bool, num_layers: int
) -> None:
    """Raises `Refusal` COMBINATION_NOT_ALLOWED for the fast path's settings elsewhere, INVALID_FIELD for too many
    layers.
    """
    asked = given.recomputation
    counts = (asked.full_layers, asked.feed_forward_layers, asked.elementwise_layers)
    named = "recomputation" if asked != type(asked)() else "base_weights"
    if trainer != FAST and (named == "recomputation" or given.base_weights not in (None, "auto")):
        raise refuse_user(
            "COMBINATION_NOT_ALLOWED",
            f"{named} is a setting of the fast path, which does not train this: {trainer_reason}",
            field=f"hyperparameters.{named}",
        )
    if given.compute == FP8 and given.base_weights == STREAMED:
        raise refuse_user(
            "COMBINATION_NOT_ALLOWED",
            "weights that are multiplied in 8 bits are rounded once and kept, not restored at each use",
            field="hyperparameters.base_weights",
        )
    if given.full_memory == LOW and (given.gradient_checkpointing is False or any(counts) or asked.offload):
        raise refuse_user(
            "COMBINATION_NOT_ALLOWED",
            "full_memory 'low' recomputes every layer, and has their inputs on the device",
            field="hyperparameters.recomputation",
        )
    if given.gradient_checkpointing is not None and any(counts):
        raise refuse_user(
            "COMBINATION_NOT_ALLOWED",
            "gradient_checkpointing speaks of all layers, recomputation of some: give one of them",
            field="hyperparameters.recomputation",
        )
    if (asked.feed_forward_slices or 1) > 1:
        _check_slices(given, trains_base=trains_base)
    total = sum(count or 0 for count in counts)
    if total > num_layers:
        raise refuse_user(
            "INVALID_FIELD",
            f"{total} layers are to be recomputed, and the model has {num_layers}",
            field="hyperparameters.recomputation",
        )


def _check_slices(given: Hyperparameters, *, trains_base: bool) -> None:
    asked = given.recomputation
    layers = (asked.full_layers, asked.feed_forward_layers, asked.elementwise_layers)
    named = any(count is not None for count in layers)
    if (named and not asked.full_layers) or given.gradient_checkpointing is False:
        raise refuse_user(
            "COMBINATION_NOT_ALLOWED",
            "feed_forward_slices are of layers that are recomputed whole, and none is to be",
            field="hyperparameters.recomputation.feed_forward_slices",
        )
    if trains_base:
        raise refuse_user(
            "COMBINATION_NOT_ALLOWED",
            "feed_forward_slices are for adapters: a weight that is trained gets its gradient in one product",
            field="hyperparameters.recomputation.feed_forward_slices",
        )


def fit(
    resolved: ResolvedHyperparameters,
    given: Hyperparameters,
    *,
    num_layers: int,
    device: Device,
    estimate: Callable[[ResolvedHyperparameters], MemoryEstimate],
) -> Fitted:
    """`estimate` tells what settings come to. Where nothing fits, what needs the least."""
    if resolved.trainer != FAST:
        return Fitted(resolved=resolved, memory=estimate(resolved), reason="")
    total = device.total_memory_bytes
    is_low = resolved.full_memory == LOW
    asked = everything(num_layers) if is_low else _asked(given, num_layers)
    is_quantized = resolved.quantization.method != "none"

    def settle(recomputation: Recomputation, weights: str) -> Fitted:
        settled = replace(
            resolved,
            recomputation=recomputation,
            gradient_checkpointing=recomputation.full_layers >= num_layers,
            base_weights=weights if is_quantized else None,
        )
        memory = estimate(settled)
        reason = f"{'asked for' if asked is not None else 'chosen'}: {recomputation.describe(num_layers)}"
        if is_quantized:
            reason += f"; weights are {_WEIGHTS[FP8 if resolved.compute == FP8 else weights]}"
        if is_low:
            reason += "; no gradient is kept: the backward pass is made twice, for the gradient's norm and for the step"
        if memory.host_bytes:
            reason += f"; {memory.host_bytes / _GIB:.1f} GiB of the host's memory"
        if total:
            reason += f"; {memory.total_bytes / _GIB:.1f} of {total / _GIB:.1f} GiB"
        return Fitted(resolved=settled, memory=memory, reason=reason)

    weights = given.base_weights if given.base_weights in (RESIDENT, STREAMED) else None
    if resolved.compute == FP8:
        weights = RESIDENT
    if weights is None and is_quantized and total and device.type == "cuda" and asked in (None, NOTHING):
        kept = settle(NOTHING, RESIDENT)
        if kept.memory.total_bytes <= _RESIDENT_PART * total:
            return kept
    ways = ladder(num_layers, may_slice=resolved.lora is not None)
    rungs = [asked] if asked is not None else ways if total else [NOTHING]
    fitted = None
    for rung in rungs:
        fitted = settle(rung, weights or STREAMED)
        if fitted.memory.total_bytes <= total:
            break
    assert fitted is not None
    return fitted


_WEIGHTS = {
    RESIDENT: "restored once and kept",
    STREAMED: "restored at each use",
    FP8: "rounded to 8 bits once for each direction, and kept",
}


def _asked(given: Hyperparameters, num_layers: int) -> Recomputation | None:
    """None: as the device needs."""
    asked = given.recomputation
    layers = (asked.full_layers, asked.feed_forward_layers, asked.elementwise_layers)
    slices = asked.feed_forward_slices or 1
    if any(count is not None for count in layers):
        full, feed_forward, elementwise = (count or 0 for count in layers)
        return Recomputation(
            full_layers=full,
            feed_forward_layers=feed_forward,
            elementwise_layers=elementwise,
            offload=bool(asked.offload) and full > 0,
            feed_forward_slices=slices,
        )
    if given.gradient_checkpointing or asked.offload or slices > 1:
        return everything(num_layers, offload=bool(asked.offload), feed_forward_slices=slices)
    return NOTHING if given.gradient_checkpointing is False else None
