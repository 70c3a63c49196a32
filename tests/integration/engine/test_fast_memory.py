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
from gpu_service.domain.defaults import apply_defaults
from gpu_service.domain.memory_estimate import estimate_memory
from gpu_service.domain.memory_passes import ExampleSize, LargestPasses
from gpu_service.domain.recomputation import NOTHING, Recomputation, everything
from gpu_service.domain.spec import Hyperparameters, decode_message
from gpu_service.engine.fast_path import torch_reference
from gpu_service.engine.fast_path.attention import Bounds
from gpu_service.engine.fast_path.block import Positions
from gpu_service.engine.fast_path.decoder import FlatPass
from gpu_service.engine.fast_path.model import FastModel, FastSettings
from gpu_service.engine.training.flat_attention import FlatLayout
from tests.fakes.fast_models import ALL_SEVEN
from tests.fakes.live_bytes import LiveBytes
from tests.unit.memory.shapes import H100, make_base

_META = torch.device("meta")
_LAYERS, _HEADS, _VOCABULARY = 5, 8, 5000
_SIZES: dict[str, Any] = {"hidden": 512, "intermediate": 1408, "layers": _LAYERS, "heads": _HEADS}
_WORKSPACE_BYTES = 2 * 32 * 1024**2


class _Kernels:
    """Allocates what kernels do: what their references give back, and nothing on the way."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live

    def __getattr__(self, name: str) -> Any:
        reference = getattr(torch_reference, name)
        return lambda *arguments, **options: self._live.see(reference(*arguments, **options))

    def prepare_ranks(self, parts: Any, **options: Any) -> Any:
        prepared = torch_reference.prepare_ranks(parts, **options)
        return replace(prepared, takes_gates=len(parts) > 1 and prepared.rank <= 32)

    def adapter_backward(self, gradient: Any, *rest: Any) -> None:
        """Tables of partial sums for layers side by side: of every slab of columns, by rows and by runs of rows."""
        prepared = rest[3]
        if len(prepared.parts) > 1 and prepared.rank <= 32:
            self._allocate_tables(len(gradient), gradient.shape[1], prepared, slab={16: 256, 32: 128}, run=128)

    def gate_adapter_backward_(self, gradient: Any, gate_up: Any, *rest: Any) -> None:
        self._allocate_tables(len(gradient), gradient.shape[1], rest[3], slab={16: 128, 32: 128}, run=32)

    def _allocate_tables(self, rows: int, width: int, prepared: Any, *, slab: dict[int, int], run: int) -> None:
        rank = max(16, 1 << (prepared.rank - 1).bit_length())
        columns = slab[rank]
        slabs = sum(-(-part.num_rows // columns) for part in prepared.parts)
        splits = max(1, min(528 // -(-width // columns), -(-rows // run)))
        tables = torch.empty(slabs, rows, rank, device=_META), torch.empty(splits, slabs, columns, rank, device=_META)
        del tables


class _Flash:
    """Allocates what FlashAttention-2's kernels do."""

    def forward(self, query: Any, key: Any, value: Any, bounds: Bounds) -> tuple[torch.Tensor, Any]:
        tokens, heads, _ = query.shape
        return torch.empty(query.shape, device=_META, dtype=query.dtype), torch.empty(heads, tokens, device=_META)

    def backward(
        self, gradient: Any, query: Any, key: Any, value: Any, output: Any, kept: Any, bounds: Bounds
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, heads, width = query.shape
        rows = tokens + 128 * len(bounds.layout.lengths)
        of_query, of_key, of_value = (
            torch.empty(part.shape, device=_META, dtype=part.dtype) for part in (query, key, value)
        )
        inside = [torch.empty(rows, heads, width, device=_META), torch.empty(heads, rows, device=_META)]
        if key.shape[1] != heads:
            inside += [torch.empty(query.shape, device=_META, dtype=query.dtype) for _ in range(2)]
        del inside
        return of_query, of_key, of_value


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
    with torch.device(_META):
        base = getattr(transformers, entry.architecture)(config).to(torch.bfloat16)
        return get_peft_model(
            base, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=list(targets), bias="none")
        )


def _lay_out(lengths: tuple[int, ...], targets: int) -> FlatPass:
    tokens = sum(lengths)

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(*shape, device=_META, dtype=dtype)

    half = _SIZES["hidden"] // _HEADS // 2
    longest = 1 << (max(lengths) - 1).bit_length()
    return FlatPass(
        tokens=empty(tokens),
        positions=Positions(
            cosines=empty(longest, half, dtype=torch.float32),
            sines=empty(longest, half, dtype=torch.float32),
            places=empty(tokens),
        ),
        bounds=Bounds(
            starts=empty(len(lengths) + 1, dtype=torch.int32), longest=max(lengths), layout=FlatLayout(lengths=lengths)
        ),
        targets=empty(targets),
        labels=empty(targets),
        sequences=empty(targets),
        targets_by_sequence=empty(len(lengths)),
    )


def _count(family: str, heads: int, rank: int, covered: tuple[str, ...], lengths: Any, part: float, plan: Any) -> int:
    """Peak of a pass forward and back, with the weights; no optimizer."""
    with LiveBytes() as live:
        model = _make_model(family, heads, rank, covered)
        settings = FastSettings(
            device=_META, compute_dtype=torch.bfloat16, keeps_weights=False, recomputation=replace(plan, offload=False)
        )
        fast = FastModel(model, settings, operations=_Kernels(live), attention=_Flash())
        live.peak = live.now
        flat = _lay_out(lengths, round(sum(lengths) * part))
        nats, kept = fast.decoder.forward(flat, adapted=True, keeps=True)
        assert kept is not None
        gradients = torch.empty(fast.adapter.numel(), device=_META, dtype=torch.bfloat16)
        fast.decoder.backward(torch.empty_like(nats, dtype=torch.float64), flat, kept, gradients)
        gradients = gradients.float()
        return live.peak


def _predict(family: str, heads: int, rank: int, covered: tuple[str, ...], lengths: Any, part: float, plan: Any) -> int:
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
    resolved = replace(resolved, trainer="fast", recomputation=plan)
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
    return estimate.peak_bytes - estimate.optimizer_bytes - _WORKSPACE_BYTES


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
}  # fmt: skip


@pytest.mark.parametrize("case", _CASES)
def test_what_is_allocated_is_what_was_planned(case: str) -> None:
    arguments = _CASES[case]
    assert _predict(*arguments) == pytest.approx(_count(*arguments), rel=0.006)
