"""Memory of the fast path as planned, against what its code allocates: counted tensor by tensor on a meta device.

What FlashAttention's kernels and cuBLAS take inside stands here as it was read from them; that it is so, a GPU says
(`benchmarks/fast_memory_grid.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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


_DENSE, _MIXED = (1024,) * 4, (700, 31, 512, 1300, 77, 420)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """A model with an adapter of `rank` on the layers `targets`, and a pass: `part` of its tokens carry loss."""

    family: str = "llama"
    key_value_heads: int = 2
    rank: int = 16
    targets: tuple[str, ...] = ALL_SEVEN
    lengths: tuple[int, ...] = _DENSE
    part: float = 0.5
    recomputation: Recomputation = NOTHING

    @property
    def num_targets(self) -> int:
        return round(sum(self.lengths) * self.part)


def _make_model(case: _Case) -> Any:
    entry = families.REGISTRY[case.family]
    config = getattr(transformers, entry.config_class)(
        vocab_size=_VOCABULARY,
        hidden_size=_SIZES["hidden"],
        intermediate_size=_SIZES["intermediate"],
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=case.key_value_heads,
        head_dim=_SIZES["hidden"] // _HEADS,
        tie_word_embeddings=True,
    )
    with torch.device(META):
        base = getattr(transformers, entry.architecture)(config).to(torch.bfloat16)
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=case.rank,
            lora_alpha=case.rank,
            target_modules=list(case.targets),
            bias="none",
        )
        return get_peft_model(base, adapter)


class _Restored:
    """Stands in for weights of NF4, of which a meta device has none."""

    def restore(self, out: torch.Tensor) -> None:
        """Allocates nothing."""


def _count(case: _Case, *, in_fp8: bool = False) -> int:
    """Peak of a pass forward and back, with the weights; no optimizer."""
    with LiveBytes() as live, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Nf4Weight, "of", lambda layer: _Restored())
        patch.setattr(fp8, "operations_for", lambda device: Kernels(live))
        model = _make_model(case)
        settings = FastSettings(
            device=META,
            compute_dtype=torch.bfloat16,
            keeps_weights=False,
            recomputation=replace(case.recomputation, offload=False),
            in_fp8=in_fp8,
        )
        fast = FastModel(model, settings, operations=Kernels(live), attention=Flash())
        live.peak = live.now
        flat = lay_out(case.lengths, case.num_targets, _SIZES["hidden"] // _HEADS)
        nats, kept = fast.decoder.forward(flat, adapted=True, keeps=True)
        assert kept is not None
        gradients = torch.empty(fast.adapter.numel(), device=META, dtype=torch.bfloat16)
        fast.decoder.backward(torch.empty_like(nats, dtype=torch.float64), flat, kept, gradients)
        gradients = gradients.float()
        return live.peak


def _predict(case: _Case, *, in_fp8: bool = False) -> int:
    base: BaseModel = replace(
        make_base(**_SIZES, key_value_heads=case.key_value_heads, vocabulary=_VOCABULARY),
        config_type=families.REGISTRY[case.family].config_types[0],
    )
    written = {"lora": {"rank": case.rank}, "batch": {"tokens": sum(case.lengths)}}
    given = decode_message(Hyperparameters, written, "")
    resolved = apply_defaults(
        given,
        method=methods.REGISTRY["lora"],
        quantization=quantization.REGISTRY["none"],
        target_modules=case.targets,
        device=H100,
        length_limit=0,
        num_steps=1,
    )
    resolved = replace(resolved, trainer="fast", recomputation=case.recomputation, compute=FP8 if in_fp8 else STANDARD)
    passes = LargestPasses(resolved.batch)
    passes.add_step(
        [
            ExampleSize(length, case.num_targets if place == 0 else 0, length)
            for place, length in enumerate(case.lengths)
        ]
    )
    layers = tuple(layer for layer in base.linear_layers if layer.leaf in case.targets)
    estimate = estimate_memory(
        base,
        resolved,
        quantization.REGISTRY["none"],
        optimizers.REGISTRY["adamw"],
        covered_layers=layers,
        num_trainable_parameters=sum(case.rank * (layer.in_features + layer.out_features) for layer in layers),
        passes=passes,
        device=H100,
    )
    # Those in 8 bits, one byte for either direction, stand beside what they are made of.
    rounded = 2 * base.num_linear_parameters if in_fp8 else 0
    return estimate.peak_bytes - estimate.optimizer_bytes - _WORKSPACE_BYTES + rounded


_CASES: dict[str, _Case] = {
    "kept": _Case(part=1.0),
    "mixed": _Case(lengths=_MIXED, part=0.6),
    "shared-by-none": _Case(key_value_heads=8),
    "head-norms": _Case(family="qwen3"),
    "few-targets": _Case(key_value_heads=4, rank=8, targets=("q_proj", "v_proj"), part=0.05),
    "wide": _Case(key_value_heads=4, rank=128),
    "elementwise": _Case(recomputation=Recomputation(elementwise_layers=3)),
    "elementwise-norms": _Case(family="qwen3", recomputation=Recomputation(elementwise_layers=5)),
    "feed-forward": _Case(recomputation=Recomputation(feed_forward_layers=2, elementwise_layers=3)),
    "some-whole": _Case(recomputation=Recomputation(full_layers=2, feed_forward_layers=1)),
    "whole": _Case(lengths=_MIXED, recomputation=everything(_LAYERS)),
    "whole-all-targets": _Case(part=1.0, recomputation=everything(_LAYERS)),
    "sliced": _Case(lengths=_MIXED, recomputation=everything(_LAYERS, feed_forward_slices=4)),
    "sliced-in-two": _Case(
        key_value_heads=8, lengths=_MIXED, part=0.1, recomputation=everything(_LAYERS, feed_forward_slices=2)
    ),
    "sliced-finely": _Case(
        key_value_heads=4,
        rank=8,
        targets=("q_proj", "down_proj"),
        lengths=_MIXED,
        part=0.1,
        recomputation=everything(_LAYERS, feed_forward_slices=16),
    ),
    "sliced-all-targets": _Case(
        family="qwen3", lengths=_MIXED, part=1.0, recomputation=everything(_LAYERS, feed_forward_slices=4)
    ),
    "sliced-in-part": _Case(lengths=_MIXED, recomputation=Recomputation(full_layers=3, feed_forward_slices=4)),
    "sliced-before-others": _Case(
        part=0.1, recomputation=Recomputation(full_layers=4, feed_forward_layers=1, feed_forward_slices=4)
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_what_is_allocated_is_what_was_planned(name: str) -> None:
    case = _CASES[name]
    assert _predict(case) == pytest.approx(_count(case), rel=0.006)


@pytest.mark.parametrize("name", ["kept", "mixed", "few-targets", "wide", "feed-forward", "whole"])
def test_what_is_allocated_in_8_bits_is_what_was_planned(name: str) -> None:
    case = _CASES[name]
    assert _predict(case, in_fp8=True) == pytest.approx(_count(case, in_fp8=True), rel=0.006)
