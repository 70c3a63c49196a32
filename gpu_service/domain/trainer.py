"""Which trainer a job takes, and why: the fast path's kernels, or transformers and PEFT. Pure; measures nothing.

`auto` is the fast path wherever that can train, on a GPU; on a CPU its kernels are references, made for tests. Named
outright, a job that the fast path cannot train is refused. docs/training.md says the same in a table.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_service.catalog.base_models import BaseModel
from gpu_service.catalog.families.entry import FamilyEntry
from gpu_service.domain.defaults import FP8, LOW, ResolvedHyperparameters
from gpu_service.domain.device import Device
from gpu_service.domain.errors import refuse_user

AUTO, FAST, REFERENCE = "auto", "fast", "reference"
_LINEARS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_QUANTIZATIONS = ("nf4", "none")
_OPTIMIZER = "adamw"
_BLOCK_WEIGHTS = 64
_ROTARY_KINDS = ("default", "llama3", "linear")
_MAX_HEAD_DIM = 256
_MAX_DROPOUT_RANK = 64
# Sides of matrices that are multiplied in 8 bits.
_FP8_SIDE = 16


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """`path` is `fast` or `reference`; `reason` is a sentence for people."""

    path: str
    reason: str


def choose_trainer(
    asked: str | None,
    resolved: ResolvedHyperparameters,
    *,
    family: FamilyEntry,
    base: BaseModel,
    device: Device,
) -> Trainer:
    """Raises `Refusal` COMBINATION_NOT_ALLOWED when the fast path, or what only it has, was asked for and cannot be."""
    obstacle = (
        _find_in_settings(resolved, device) or _find_in_model(family, base) or _find_in_config(base.config, resolved)
    )
    if resolved.compute == FP8:
        _check_fp8(asked, obstacle, resolved, base, device)
        return Trainer(path=FAST, reason="asked for, with products in 8 bits (fp8): other numerics than bfloat16's")
    if resolved.full_memory == LOW:
        _check_low_memory(asked, obstacle, resolved)
        return Trainer(path=FAST, reason="asked for, in little memory: other numerics than float32's")
    if asked == REFERENCE:
        return Trainer(path=REFERENCE, reason="asked for")
    if asked == FAST:
        if obstacle:
            raise refuse_user(
                "COMBINATION_NOT_ALLOWED",
                f"the fast path cannot train this: {obstacle}; leave hyperparameters.trainer at 'auto'",
                field="hyperparameters.trainer",
            )
        return Trainer(path=FAST, reason="asked for")
    if device.type != "cuda":
        obstacle = obstacle or "the fast path is for GPUs; elsewhere it is taken when it is asked for"
    if obstacle:
        return Trainer(path=REFERENCE, reason=obstacle)
    return Trainer(path=FAST, reason="nothing keeps the fast path from it")


def adds_up_passes(
    *,
    examples: int | None,
    tokens: int | None,
    micro_batch_examples: int | None,
    micro_batch_tokens: int | None,
) -> bool:
    """Whether steps of a resolved batch may have several forward passes. None and 0 are no limit."""
    by_tokens = bool(micro_batch_tokens) and (micro_batch_tokens or 0) < (tokens or math.inf)
    by_examples = bool(micro_batch_examples) and (micro_batch_examples or 0) < (examples or math.inf)
    return by_tokens or by_examples


def trainer_of(manifest: Mapping[str, Any]) -> str:
    """What trained the steps of a checkpoint; empty for one of an older version, which did not say."""
    return str(manifest.get("trainer") or "")


def go_on_with(chosen: Trainer, *, asked: str | None, begun_by: str) -> Trainer:
    """What trains on from a checkpoint whose steps `begun_by` made; empty where that is not known, or nothing was.

    A job that left it open keeps to transformers and PEFT if they began it: a curve should not change because of an
    upgrade. One that the fast path began goes on so wherever that can train.
    """
    if begun_by != REFERENCE or asked not in (None, AUTO) or chosen.path == REFERENCE:
        return chosen
    return Trainer(path=REFERENCE, reason="the steps before the checkpoint that it goes on from were trained so")


def _check_fp8(
    asked: str | None, obstacle: str, resolved: ResolvedHyperparameters, base: BaseModel, device: Device
) -> None:
    sides = {side for layer in base.linear_layers for side in (layer.in_features, layer.out_features)}
    refusals = (
        (asked == REFERENCE, "the reference trainer was asked for"),
        (bool(obstacle), obstacle),
        (resolved.quantization.method != "nf4", "it rounds weights of nf4 alone"),
        (resolved.quantization.compute_dtype != "bfloat16", "all else must be in bfloat16"),
        (any(side % _FP8_SIDE for side in sides), f"the model's layers are no multiples of {_FP8_SIDE}"),
        (
            device.type == "cuda" and not device.has_float8,
            f"products in 8 bits need compute capability 9.0 or newer, and {device.name} has "
            f"{device.compute_capability}",
        ),
    )
    for holds, reason in refusals:
        if holds:
            raise refuse_user(
                "COMBINATION_NOT_ALLOWED",
                f"compute 'fp8' is the fast path's, and cannot be had here: {reason}",
                field="hyperparameters.compute",
            )


def _check_low_memory(asked: str | None, obstacle: str, resolved: ResolvedHyperparameters) -> None:
    refusals = (
        (resolved.lora is not None, "it is of training type 'full', and an adapter is trained"),
        (asked == REFERENCE, "the reference trainer was asked for"),
        (bool(obstacle), obstacle),
        (resolved.quantization.compute_dtype != "bfloat16", "weights are held in bfloat16, and so are products"),
        (
            adds_up_passes(**vars(resolved.batch)),
            "no gradient is kept, so a step is one forward pass: leave micro-batches out, or make the batch smaller",
        ),
    )
    for holds, reason in refusals:
        if holds:
            raise refuse_user(
                "COMBINATION_NOT_ALLOWED",
                f"full_memory 'low' is the fast path's, and cannot be had here: {reason}",
                field="hyperparameters.full_memory",
            )


def _find_in_settings(resolved: ResolvedHyperparameters, device: Device) -> str:
    quantization = resolved.quantization
    if quantization.method not in _QUANTIZATIONS:
        return f"the fast path has no kernels for quantization {quantization.method!r}"
    if resolved.optimizer.name != _OPTIMIZER:
        return f"the fast path steps with {_OPTIMIZER!r}, not with {resolved.optimizer.name!r}"
    if resolved.lora is not None and resolved.lora.dropout > 0 and resolved.lora.rank > _MAX_DROPOUT_RANK:
        return f"the fast path has dropout for ranks up to {_MAX_DROPOUT_RANK}"
    if quantization.compute_dtype not in ("bfloat16", "float32"):
        return f"the fast path does not compute in {quantization.compute_dtype}"
    if device.type == "cuda" and not device.has_bfloat16:
        return f"the fast path needs compute capability 8.0 or newer, and {device.name} has {device.compute_capability}"
    if not device.has_kernels:
        return f"the fast path's kernels cannot be compiled here ({device.kernel_problem})"
    return ""


def _find_in_model(family: FamilyEntry, base: BaseModel) -> str:
    if not family.has_fast_path:
        return f"the fast path does not know model type {family.id!r}"
    others = sorted({layer.leaf for layer in base.linear_layers} - _LINEARS)
    if others:
        return f"the model has layers that the fast path does not know: {', '.join(others[:3])}"
    uneven = next((layer for layer in base.linear_layers if layer.in_features % _BLOCK_WEIGHTS), None)
    if uneven is not None:
        return f"{uneven.path} has rows of {uneven.in_features} weights, which is no multiple of {_BLOCK_WEIGHTS}"
    return ""


def _find_in_config(config: Mapping[str, Any], resolved: ResolvedHyperparameters) -> str:
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rotary.get("rope_type") or rotary.get("type") or _ROTARY_KINDS[0]
    if kind not in _ROTARY_KINDS:
        return f"the fast path has no rotary positions of kind {kind!r}"
    if config.get("partial_rotary_factor", rotary.get("partial_rotary_factor", 1)) not in (1, 1.0, None):
        return "the model rotates a part of each head only"
    if config.get("hidden_act", "silu") != "silu":
        return f"the fast path knows the activation 'silu' alone, not {config['hidden_act']!r}"
    if config.get("attention_dropout"):
        return "the model drops a part of its attention in training"
    window = config.get("sliding_window")
    if window is not None and config.get("use_sliding_window", True) and resolved.max_length > window:
        return f"examples may be longer than the model's sliding window of {window} tokens"
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // (config.get("num_attention_heads") or 1)
    if head_dim > _MAX_HEAD_DIM or head_dim % 8:
        return f"attention heads are {head_dim} wide"
    return ""
