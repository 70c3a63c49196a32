"""Tiny models with LoRA, as PEFT runs them and as the fast path does; every gradient of an adapter is non-zero."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from gpu_service.domain.recomputation import NOTHING, Recomputation
from gpu_service.engine.fast_path.model import FastModel, FastSettings
from gpu_service.engine.training.batches import MicroBatchLimit, collate, split
from gpu_service.engine.training.flat_attention import attending_within_sequences
from gpu_service.engine.training.likelihood import nats_by_sequence
from tests.fakes.flat_models import LENGTHS, VOCABULARY_SIZE, make_model
from tests.fakes.planned_rows import PlannedRows, make_examples

ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_peft(
    family: str = "llama",
    extras: dict[str, Any] | None = None,
    *,
    targets: tuple[str, ...] = ALL_SEVEN,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    quantize: Any = None,
) -> Any:
    """A PEFT model with float32 adapters, B drawn too. `quantize` changes the base before."""
    base = make_model(family, extras or {}, dtype)
    if quantize is not None:
        base = quantize(base)
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=3 * rank, target_modules=list(targets), bias="none")
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter, dtype=torch.float32) * (0.1 if "lora_B" in name else 0.2)
    return model


def make_fast(
    model: Any,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    keeps_weights: bool = False,
    in_fp8: bool = False,
    recomputes: bool = False,
    recomputation: Recomputation = NOTHING,
) -> FastModel:
    """Every pass is launched kernel by kernel."""
    return FastModel(
        model,
        FastSettings(
            device=torch.device(device),
            compute_dtype=dtype,
            keeps_weights=keeps_weights,
            in_fp8=in_fp8,
            recomputes=recomputes,
            recomputation=recomputation,
            records=False,
        ),
    )


def nats(model: Any, rows: PlannedRows, limit: MicroBatchLimit | None = None, device: str = "cpu") -> torch.Tensor:
    """Nats of every example in flat passes, through either path."""
    with attending_within_sequences(model):
        return torch.cat(
            [
                nats_by_sequence(model, collate(rows.as_data(), part).to(torch.device(device)))
                for part in split(rows.as_data(), rows.references, limit or MicroBatchLimit())
            ]
        )


def example_rows() -> PlannedRows:
    """The same examples each time, of many lengths."""
    return PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3))


def plain_gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """By PEFT's names."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def fast_gradients(model: Any, fast: FastModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same of the fast path; `model` is the PEFT model beside it."""
    (flat,) = torch.autograd.grad(loss, [fast.adapter])
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return dict(zip(names, fast.flat_adapter.views(flat), strict=True))


def gradient_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, as a part of their norm."""
    apart = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    return float(apart.norm() / torch.cat([value.flatten() for value in expected.values()]).norm())


def hold_in_nf4(base: Any, *, double: bool = True, device: str = "cpu") -> Any:
    """The same model with every linear layer but the head held by bitsandbytes in NF4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in base.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                held = Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    compute_dtype=linear.weight.dtype,
                    compress_statistics=double,
                    quant_type="nf4",
                )
                held.weight = Params4bit(
                    linear.weight.data, requires_grad=False, compress_statistics=double, quant_type="nf4"
                )
                held.bias = linear.bias
                setattr(part, name, held.to(device))
    return base.to(device)
