"""Memory of full training as planned, against what its code allocates: counted tensor by tensor on a meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from gpu_service.catalog import families, methods, optimizers, quantization
from gpu_service.domain.defaults import LOW, STANDARD, apply_defaults
from gpu_service.domain.memory_estimate import estimate_memory
from gpu_service.domain.memory_passes import ExampleSize, LargestPasses
from gpu_service.domain.recomputation import NOTHING, Recomputation, everything
from gpu_service.domain.spec import Hyperparameters, decode_message
from gpu_service.engine.fast_path.full_adamw import FullAdamW
from gpu_service.engine.fast_path.full_head import Upstream
from gpu_service.engine.fast_path.full_low_memory import LowMemoryModel
from gpu_service.engine.fast_path.full_model import FullModel, FullSettings
from tests.fakes.counted_kernels import META, Flash, Kernels, lay_out
from tests.fakes.live_bytes import LiveBytes
from tests.unit.memory.shapes import H100, make_base

_LAYERS, _HEADS, _VOCABULARY = 5, 8, 5000
_SIZES: dict[str, Any] = {"hidden": 512, "intermediate": 1408, "layers": _LAYERS, "heads": _HEADS}
_WORKSPACE_BYTES = 2 * 32 * 1024**2


class _FullKernels:
    """Allocates what the kernels of full training do; sums of norms are small."""

    def weigh(self, gradient: Any, rows: Any, out: Any, *, adds: bool) -> None: ...

    def sum_rows(self, gradient: Any, out: Any, *, adds: bool) -> None: ...

    def weigh_norm(self, gradient: Any, x: Any, scale: Any, out: Any, *, heads: int, adds: bool) -> None: ...

    def add_rows(self, gradient: Any, tokens: Any, out: Any) -> None: ...


def _make_model(family: str, key_value_heads: int, dtype: torch.dtype) -> Any:
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
        return getattr(transformers, entry.architecture)(config).to(dtype)


def _count(family: str, heads: int, lengths: Any, part: float, plan: Any, batch: dict[str, int], memory: str) -> int:
    """Peak of a pass forward and back, with weights and gradients; no optimizer."""
    dtype = torch.float32 if memory == STANDARD else torch.bfloat16
    kind = FullModel if memory == STANDARD else LowMemoryModel
    with LiveBytes() as live:
        settings = FullSettings(
            device=META,
            compute_dtype=torch.bfloat16,
            accumulates=bool(batch),
            recomputation=plan,
        )
        full = kind(
            _make_model(family, heads, dtype),
            settings,
            operations=Kernels(live),
            kernels=_FullKernels(),
            attention=Flash(),
        )
        live.peak = live.now
        flat = lay_out(lengths, round(sum(lengths) * part), _SIZES["hidden"] // _HEADS)
        nats, kept = full.decoder.forward(flat, keeps=True)
        assert kept is not None
        upstream = Upstream(by_target=torch.empty_like(nats), shared=torch.empty(1, device=META))
        full.carry_back(upstream, flat, kept)
        del upstream
        if isinstance(full, LowMemoryModel):
            full.sweep(lambda region, gradient: None, is_last=False)
            full.sweep(lambda region, gradient: None, is_last=True)
        return live.peak


def _predict(family: str, heads: int, lengths: Any, part: float, plan: Any, batch: dict[str, int], memory: str) -> int:
    base = replace(
        make_base(**_SIZES, key_value_heads=heads, vocabulary=_VOCABULARY),
        config_type=families.REGISTRY[family].config_types[0],
    )
    given = decode_message(Hyperparameters, {"batch": {"tokens": sum(lengths), **batch}}, "")
    resolved = apply_defaults(
        given,
        method=methods.REGISTRY["full"],
        quantization=quantization.REGISTRY["none"],
        target_modules=(),
        device=H100,
        length_limit=0,
        num_steps=1,
    )
    resolved = replace(resolved, trainer="fast", recomputation=plan, full_memory=memory)
    passes = LargestPasses(resolved.batch)
    targets = round(sum(lengths) * part)
    passes.add_step([ExampleSize(length, targets if place == 0 else 0, length) for place, length in enumerate(lengths)])
    estimate = estimate_memory(
        base,
        resolved,
        quantization.REGISTRY["none"],
        optimizers.REGISTRY["adamw"],
        covered_layers=(),
        num_trainable_parameters=base.num_parameters,
        passes=passes,
        device=H100,
    )
    return estimate.peak_bytes - estimate.optimizer_bytes - _WORKSPACE_BYTES


_DENSE, _MIXED = (1024,) * 4, (700, 31, 512, 1300, 77, 420)
_ALL = everything(_LAYERS)
_CASES: dict[str, tuple[Any, ...]] = {
    "kept": ("llama", 2, _DENSE, 1.0, NOTHING, {}, STANDARD),
    "mixed": ("llama", 2, _MIXED, 0.6, NOTHING, {}, STANDARD),
    "head-norms": ("qwen3", 2, _DENSE, 0.5, NOTHING, {}, STANDARD),
    "few-targets": ("llama", 8, _DENSE, 0.05, NOTHING, {}, STANDARD),
    "elementwise": ("llama", 2, _DENSE, 0.5, Recomputation(elementwise_layers=3), {}, STANDARD),
    "whole": ("llama", 2, _DENSE, 0.5, _ALL, {}, STANDARD),
    "several-passes": ("llama", 2, _DENSE, 0.5, NOTHING, {"micro_batch_examples": 4}, STANDARD),
    "low": ("llama", 2, _DENSE, 0.5, _ALL, {}, LOW),
    "low-few-tokens": ("llama", 8, (100,), 1.0, _ALL, {}, LOW),
    "low-short": ("llama", 2, (256,) * 2, 0.5, _ALL, {}, LOW),
    "low-all-targets": ("qwen3", 2, _MIXED, 1.0, _ALL, {}, LOW),
}


@pytest.mark.parametrize("case", _CASES)
def test_what_is_allocated_is_what_was_planned(case: str) -> None:
    arguments = _CASES[case]
    assert _predict(*arguments) == pytest.approx(_count(*arguments), rel=0.01)


def test_moments_are_what_the_catalog_says() -> None:
    with LiveBytes() as live:
        full = FullModel(
            _make_model("llama", 2, torch.float32), FullSettings(device=META, compute_dtype=torch.bfloat16),
            operations=Kernels(live), kernels=_FullKernels(), attention=Flash(),
        )  # fmt: skip
        before = live.now
        optimizer = FullAdamW(full.weights, full.gradients, _optimizer(), kernels=_FullKernels())
        assert live.now - before == pytest.approx(8 * full.weights.held.numel(), rel=0.001)
        del optimizer


def _optimizer() -> Any:
    from tunesmith.common.v1 import training_spec_pb2

    return training_spec_pb2.Optimizer(learning_rate=1e-3, beta1=0.9, beta2=0.99, epsilon=1e-8)
