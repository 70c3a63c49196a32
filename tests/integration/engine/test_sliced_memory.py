"""Memory of blocks in slices as planned, against what is allocated, where the base is quantized: the weights of the
feed-forward half are restored for a time. In passes that are trained and measured alone; counted on a meta device.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_service.catalog import methods, optimizers, quantization
from gpu_service.domain.defaults import apply_defaults
from gpu_service.domain.memory_estimate import MemoryEstimate, estimate_memory
from gpu_service.domain.memory_passes import ExampleSize, LargestPasses
from gpu_service.domain.recomputation import Recomputation, everything
from gpu_service.domain.spec import Hyperparameters, decode_message
from gpu_service.engine.fast_path.model import FastModel, FastSettings
from tests.fakes.counted_kernels import META, Flash, Kernels, lay_out
from tests.fakes.fast_models import ALL_SEVEN
from tests.fakes.live_bytes import LiveBytes
from tests.unit.memory.shapes import H100, make_base

_LAYERS, _HEADS, _KEY_VALUE_HEADS, _HIDDEN, _INNER, _VOCABULARY = 4, 8, 2, 512, 2048, 3000
_RANK = 16
_LENGTHS = (700, 31, 512, 1300, 77, 420)
_WORKSPACE_BYTES = 2 * 32 * 1024**2


def _make_model() -> Any:
    """Of empty tensors; linear layers as bitsandbytes holds them in NF4, with scales that are quantized."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_HIDDEN,
        intermediate_size=_INNER,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_KEY_VALUE_HEADS,
        head_dim=_HIDDEN // _HEADS,
        tie_word_embeddings=True,
    )
    with torch.device(META):
        model = get_peft_model(
            LlamaForCausalLM(config).to(torch.bfloat16),
            LoraConfig(task_type="CAUSAL_LM", r=_RANK, lora_alpha=_RANK, target_modules=list(ALL_SEVEN), bias="none"),
        )
        for module in list(model.modules()):
            if hasattr(module, "lora_A"):
                module.base_layer.weight = _quantized(module.base_layer.weight.numel())
    return model


def _quantized(num_weights: int) -> Any:
    scales = num_weights // 64
    state = SimpleNamespace(
        quant_type="nf4",
        blocksize=64,
        nested=True,
        code=torch.empty(16),
        absmax=torch.empty(scales, dtype=torch.uint8),
        state2=SimpleNamespace(blocksize=256, code=torch.empty(256), absmax=torch.empty(-(-scales // 256))),
        offset=torch.empty(()),
    )
    weight: Any = torch.nn.Parameter(torch.empty(num_weights // 2, 1, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = state
    return weight


def _count(way: Recomputation, part: float, *, trained: bool) -> int:
    """Peak of a pass, with the weights; no optimizer."""
    with LiveBytes() as live:
        settings = FastSettings(
            device=META, compute_dtype=torch.bfloat16, keeps_weights=False, recomputation=replace(way, offload=False)
        )
        fast = FastModel(_make_model(), settings, operations=Kernels(live), attention=Flash())
        live.peak = live.now
        flat = lay_out(_LENGTHS, round(sum(_LENGTHS) * part), _HIDDEN // _HEADS)
        nats, kept = fast.decoder.forward(flat, adapted=True, keeps=trained)
        if kept is not None:
            gradients = torch.empty(fast.adapter.numel(), device=META, dtype=torch.bfloat16)
            fast.decoder.backward(torch.empty_like(nats, dtype=torch.float64), flat, kept, gradients)
            gradients = gradients.float()
        return live.peak


def _predict(way: Recomputation, part: float, *, trained: bool) -> int:
    base = make_base(
        hidden=_HIDDEN,
        intermediate=_INNER,
        layers=_LAYERS,
        heads=_HEADS,
        key_value_heads=_KEY_VALUE_HEADS,
        vocabulary=_VOCABULARY,
    )
    given = {"lora": {"rank": _RANK}, "batch": {"tokens": sum(_LENGTHS)}}
    resolved = apply_defaults(
        decode_message(Hyperparameters, given, ""),
        method=methods.REGISTRY["qlora"],
        quantization=quantization.REGISTRY["nf4"],
        target_modules=ALL_SEVEN,
        device=H100,
        length_limit=0,
        num_steps=1,
    )
    passes = LargestPasses(resolved.batch)
    targets = round(sum(_LENGTHS) * part)
    examples = [ExampleSize(length, targets if place == 0 else 0, length) for place, length in enumerate(_LENGTHS)]
    (passes.add_step if trained else passes.add_evaluation)(examples)
    layers = base.linear_layers
    estimate: MemoryEstimate = estimate_memory(
        base,
        replace(resolved, trainer="fast", base_weights="streamed", recomputation=way),
        quantization.REGISTRY["nf4"],
        optimizers.REGISTRY["adamw"],
        covered_layers=layers,
        num_trainable_parameters=sum(_RANK * (layer.in_features + layer.out_features) for layer in layers),
        passes=passes,
        device=H100,
    )
    return estimate.peak_bytes - estimate.optimizer_bytes - _WORKSPACE_BYTES


_WAYS = {
    "whole": everything(_LAYERS),
    "two": everything(_LAYERS, feed_forward_slices=2),
    "four": everything(_LAYERS, feed_forward_slices=4),
    "twelve": everything(_LAYERS, feed_forward_slices=12),
    "in-part": Recomputation(full_layers=2, feed_forward_slices=4),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("part", [0.02, 1.0])
def test_what_is_allocated_is_what_was_planned(way: str, part: float, trained: bool) -> None:
    counted = _count(_WAYS[way], part, trained=trained)
    assert _predict(_WAYS[way], part, trained=trained) == pytest.approx(counted, rel=0.006)
