"""Memory of the fast path as planned, against what its code allocates: counted tensor by tensor on a meta device.

What FlashAttention's kernels and cuBLAS take inside stands here as it was read from them; that it is so, a GPU says
(`benchmarks/fast_memory_grid.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from gpu_service.catalog import families, methods, optimizers, quantization
from gpu_service.catalog.base_models import BaseModel
from gpu_service.domain.defaults import FP8, STANDARD, apply_defaults
from gpu_service.domain.memory_estimate import estimate_memory
from gpu_service.domain.memory_passes import ExampleSize, LargestPasses
from gpu_service.domain.recomputation import NOTHING, Recomputation, everything
from gpu_service.domain.spec import Hyperparameters, decode_message
from gpu_service.engine.fast_path import fp8
from gpu_service.engine.fast_path.model import FastModel, FastSettings
from gpu_service.engine.fast_path.nf4 import Nf4Weight
from tests.fakes.counted_kernels import META, Flash, Kernels, lay_out
from tests.fakes.fast_models import ALL_SEVEN
from tests.fakes.live_bytes import LiveBytes
from tests.unit.memory.shapes import H100, make_base

_LAYERS, _HEADS, _VOCABULARY = 5, 8, 5000
_SIZES: dict[str, Any] = {"hidden": 512, "intermediate": 1408, "layers": _LAYERS, "heads": _HEADS}
_WORKSPACE_BYTES = 2 * 32 * 1024**2


def _make_model(family: str, key_value_heads: int, rank: int, targets: tuple[str, ...]) -> Any:
    entry = families.REGISTRY[family]
    config = getattr(transformers, entry.config_class)(
        vocab_size=_VOCABULARY,
        hidden_size=_SIZES["hidden"],
        intermediate_size=_SIZES["intermediate"],
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=key_value_heads,
        head_dim=_SIZES["hidden"] // _HEADS,
        tie_word_embeddings=True,
    )
    with torch.device(META):
        base = getattr(transformers, entry.architecture)(config).to(torch.bfloat16)
        return get_peft_model(
            base, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=list(targets), bias="none")
        )


class _Restored:
    """Stands in for weights of NF4, of which a meta device has none."""

    def restore(self, out: torch.Tensor) -> None:
        """Allocates nothing."""


def _count(
    family: str,
    heads: int,
    rank: int,
    covered: tuple[str, ...],
    lengths: Any,
    part: float,
    plan: Any,
    *,
    in_fp8: bool = False,
) -> int:
    """Peak of a pass forward and back, with the weights; no optimizer."""
    with LiveBytes() as live, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Nf4Weight, "of", lambda layer: _Restored())
        patch.setattr(fp8, "operations_for", lambda device: Kernels(live))
        model = _make_model(family, heads, rank, covered)
        settings = FastSettings(
            device=META,
            compute_dtype=torch.bfloat16,
            keeps_weights=False,
            recomputation=replace(plan, offload=False),
            in_fp8=in_fp8,
        )
        fast = FastModel(model, settings, operations=Kernels(live), attention=Flash())
        live.peak = live.now
        flat = lay_out(lengths, round(sum(lengths) * part), _SIZES["hidden"] // _HEADS)
        nats, kept = fast.decoder.forward(flat, adapted=True, keeps=True)
        assert kept is not None
        gradients = torch.empty(fast.adapter.numel(), device=META, dtype=torch.bfloat16)
        fast.decoder.backward(torch.empty_like(nats, dtype=torch.float64), flat, kept, gradients)
        gradients = gradients.float()
        return live.peak


def _predict(
    family: str,
    heads: int,
    rank: int,
    covered: tuple[str, ...],
    lengths: Any,
    part: float,
    plan: Any,
    *,
    in_fp8: bool = False,
) -> int:
    base: BaseModel = replace(
        make_base(**_SIZES, key_value_heads=heads, vocabulary=_VOCABULARY),
        config_type=families.REGISTRY[family].config_types[0],
    )
    given = decode_message(Hyperparameters, {"lora": {"rank": rank}, "batch": {"tokens": sum(lengths)}}, "")
    resolved = apply_defaults(
        given,
        method=methods.REGISTRY["lora"],
        quantization=quantization.REGISTRY["none"],
        target_modules=covered,
        device=H100,
        length_limit=0,
        num_steps=1,
    )
    resolved = replace(resolved, trainer="fast", recomputation=plan, compute=FP8 if in_fp8 else STANDARD)
    passes = LargestPasses(resolved.batch)
    targets = round(sum(lengths) * part)
    passes.add_step([ExampleSize(length, targets if place == 0 else 0, length) for place, length in enumerate(lengths)])
    layers = tuple(layer for layer in base.linear_layers if layer.leaf in covered)
    estimate = estimate_memory(
        base,
        resolved,
        quantization.REGISTRY["none"],
        optimizers.REGISTRY["adamw"],
        covered_layers=layers,
        num_trainable_parameters=sum(rank * (layer.in_features + layer.out_features) for layer in layers),
        passes=passes,
        device_type="cuda",
    )
    # Those in 8 bits, one byte for either direction, stand beside what they are made of.
    rounded = 2 * base.num_linear_parameters if in_fp8 else 0
    return estimate.peak_bytes - estimate.optimizer_bytes - _WORKSPACE_BYTES + rounded


_DENSE, _MIXED = (1024,) * 4, (700, 31, 512, 1300, 77, 420)
_CASES: dict[str, tuple[Any, ...]] = {
    "kept": ("llama", 2, 16, ALL_SEVEN, _DENSE, 1.0, NOTHING),
    "mixed": ("llama", 2, 16, ALL_SEVEN, _MIXED, 0.6, NOTHING),
    "shared-by-none": ("llama", 8, 16, ALL_SEVEN, _DENSE, 0.5, NOTHING),
    "head-norms": ("qwen3", 2, 16, ALL_SEVEN, _DENSE, 0.5, NOTHING),
    "few-targets": ("llama", 4, 8, ("q_proj", "v_proj"), _DENSE, 0.05, NOTHING),
    "wide": ("llama", 4, 128, ALL_SEVEN, _DENSE, 0.5, NOTHING),
    "elementwise": ("llama", 2, 16, ALL_SEVEN, _DENSE, 0.5, Recomputation(elementwise_layers=3)),
    "elementwise-norms": ("qwen3", 2, 16, ALL_SEVEN, _DENSE, 0.5, Recomputation(elementwise_layers=5)),
    "feed-forward": (
        "llama", 2, 16, ALL_SEVEN, _DENSE, 0.5, Recomputation(feed_forward_layers=2, elementwise_layers=3)
    ),
    "some-whole": ("llama", 2, 16, ALL_SEVEN, _DENSE, 0.5, Recomputation(full_layers=2, feed_forward_layers=1)),
    "whole": ("llama", 2, 16, ALL_SEVEN, _MIXED, 0.5, everything(_LAYERS)),
    "whole-all-targets": ("llama", 2, 16, ALL_SEVEN, _DENSE, 1.0, everything(_LAYERS)),
    "sliced": ("llama", 2, 16, ALL_SEVEN, _MIXED, 0.5, everything(_LAYERS, feed_forward_slices=4)),
    "sliced-in-two": ("llama", 8, 16, ALL_SEVEN, _MIXED, 0.1, everything(_LAYERS, feed_forward_slices=2)),
    "sliced-finely": ("llama", 4, 8, ("q_proj", "down_proj"), _MIXED, 0.1, everything(_LAYERS, feed_forward_slices=16)),
    "sliced-all-targets": ("qwen3", 2, 16, ALL_SEVEN, _MIXED, 1.0, everything(_LAYERS, feed_forward_slices=4)),
    "sliced-in-part": ("llama", 2, 16, ALL_SEVEN, _MIXED, 0.5, Recomputation(full_layers=3, feed_forward_slices=4)),
    "sliced-before-others": (
        "llama", 2, 16, ALL_SEVEN, _DENSE, 0.1,
        Recomputation(full_layers=4, feed_forward_layers=1, feed_forward_slices=4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", _CASES)
def test_what_is_allocated_is_what_was_planned(case: str) -> None:
    arguments = _CASES[case]
    assert _predict(*arguments) == pytest.approx(_count(*arguments), rel=0.006)


@pytest.mark.parametrize("case", ["kept", "mixed", "few-targets", "wide", "feed-forward", "whole"])
def test_what_is_allocated_in_8_bits_is_what_was_planned(case: str) -> None:
    arguments = _CASES[case]
    assert _predict(*arguments, in_fp8=True) == pytest.approx(_count(*arguments, in_fp8=True), rel=0.006)
