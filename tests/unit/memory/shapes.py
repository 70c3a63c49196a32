"""Bases and settings for estimates, without a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_service.catalog import methods, optimizers, quantization
from gpu_service.catalog.base_models import BaseModel, LinearLayer
from gpu_service.domain.defaults import apply_defaults
from gpu_service.domain.device import Device
from gpu_service.domain.memory_calibration import UNCALIBRATED, Calibration
from gpu_service.domain.memory_estimate import MemoryEstimate, estimate_memory
from gpu_service.domain.memory_passes import ExampleSize, LargestPasses
from gpu_service.domain.spec import Hyperparameters, decode_message

H100 = Device(type="cuda", name="NVIDIA H100 80GB HBM3", total_memory_bytes=85_000_000_000, compute_capability="9.0")


def make_base(
    *,
    hidden: int = 2048,
    intermediate: int = 8192,
    layers: int = 16,
    heads: int = 32,
    key_value_heads: int = 8,
    vocabulary: int = 128_256,
) -> BaseModel:
    """A llama with a tied head; by default of Llama 3.2 1B's shape."""
    head_dim = hidden // heads
    sides = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, key_value_heads * head_dim),
        "self_attn.v_proj": (hidden, key_value_heads * head_dim),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, intermediate),
        "mlp.up_proj": (hidden, intermediate),
        "mlp.down_proj": (intermediate, hidden),
    }
    linear = tuple(
        LinearLayer(path=f"model.layers.{layer}.{name}", in_features=wide, out_features=out)
        for layer in range(layers)
        for name, (wide, out) in sides.items()
    )
    num_linear = sum(one.in_features * one.out_features for one in linear)
    return BaseModel(
        name="org/base",
        directory=Path("/nowhere"),
        config={"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": head_dim},
        config_type="llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        vocabulary_size=vocabulary,
        linear_layers=linear,
        num_parameters=num_linear + (2 * layers + 1) * hidden + vocabulary * hidden,
    )


def make_estimate(
    training_type: str = "qlora",
    *,
    base: BaseModel | None = None,
    examples: tuple[ExampleSize, ...] = (ExampleSize(2048, 512, 2048),) * 4,
    device: Device = H100,
    calibration: Calibration = UNCALIBRATED,
    **hyperparameters: Any,
) -> MemoryEstimate:
    """The estimate of a run each of whose steps has these examples."""
    base = base or make_base()
    method = methods.REGISTRY[training_type]
    given = decode_message(
        Hyperparameters, {"batch": {"examples": len(examples)}, **hyperparameters}, "hyperparameters"
    )
    quantized = quantization.REGISTRY[given.quantization.method or method.quantizations[0]]
    resolved = apply_defaults(
        given,
        method=method,
        quantization=quantized,
        target_modules=("q_proj",),
        device=device,
        length_limit=0,
        num_steps=1,
    )
    passes = LargestPasses(resolved.batch)
    passes.add_step(examples)
    trainable = base.num_parameters
    if resolved.lora is not None:
        trainable = sum(resolved.lora.rank * (one.in_features + one.out_features) for one in base.linear_layers)
    return estimate_memory(
        base,
        resolved,
        quantized,
        optimizers.REGISTRY[resolved.optimizer.name],
        covered_layers=base.linear_layers,
        num_trainable_parameters=trainable,
        passes=passes,
        device=device,
        calibration=calibration,
    )
