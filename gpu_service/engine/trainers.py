"""Makes what trains: transformers and PEFT under accelerate, or the fast path. The plan has decided which.

Knows what the loop, checkpoints and exports ask of either; what a step is, the loop knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from gpu_service.catalog import optimizers
from gpu_service.domain.defaults import FP8, RESIDENT, STREAMED
from gpu_service.domain.recomputation import Recomputation
from gpu_service.engine.fast_path.flat_adamw import FlatAdamW
from gpu_service.engine.fast_path.model import FastModel, FastSettings
from gpu_service.engine.fast_path.nf4 import name_quantizer
from gpu_service.engine.lean.method import LeanAdapted
from gpu_service.engine.precision import DTYPES
from gpu_service.engine.training.accelerator import LeanAccelerator, make_accelerator
from tunesmith.common.v1 import training_spec_pb2


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """`model` is what flat batches go through. `saved` is the same for what writes and samples: PEFT's, or the base."""

    accelerator: Any
    model: Any
    saved: Any
    optimizer: Any
    # In words, for the log.
    description: str
    _release: Callable[[], None]
    # Makes passes keep less, with the same results: how, in words; empty where nothing more can be saved.
    recompute_more: Callable[[], str] = lambda: ""
    # Lets go of quantized weights that stand restored: likewise.
    stream_weights: Callable[[], str] = lambda: ""

    def release(self) -> None:
        """Give the loaded base back as it was; nothing trains any more. Does nothing the second time."""
        self._release()


def make_trainer(model: Any, settings: training_spec_pb2.Hyperparameters, device: torch.device) -> Trainer:
    """What trains `model`, the loaded one, by the plan's resolved settings."""
    make = LeanAccelerator if isinstance(model, LeanAdapted) else make_accelerator
    accelerator = make(device, DTYPES[settings.quantization.compute_dtype])
    return _MAKERS[settings.trainer or "reference"](model, settings, device, accelerator)


def _make_reference(
    model: Any, settings: training_spec_pb2.Hyperparameters, device: torch.device, accelerator: Any
) -> Trainer:
    del device
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    builder = import_module(optimizers.REGISTRY[settings.optimizer.name].builder)
    prepared, optimizer = accelerator.prepare(model, builder.build(trainable, settings.optimizer))
    return Trainer(
        accelerator=accelerator,
        model=prepared,
        saved=accelerator.unwrap_model(prepared),
        optimizer=optimizer,
        description="transformers and PEFT",
        _release=lambda: None,
    )


def _make_fast(
    model: Any, settings: training_spec_pb2.Hyperparameters, device: torch.device, accelerator: Any
) -> Trainer:
    fast = FastModel(
        model,
        FastSettings(
            device=device,
            compute_dtype=DTYPES[settings.quantization.compute_dtype],
            keeps_weights=settings.base_weights == RESIDENT,
            in_fp8=settings.compute == FP8,
            # A plan says it by layer.
            recomputes=settings.gradient_checkpointing and not settings.HasField("recomputation"),
            recomputation=Recomputation(
                full_layers=settings.recomputation.full_layers,
                feed_forward_layers=settings.recomputation.feed_forward_layers,
                elementwise_layers=settings.recomputation.elementwise_layers,
                offload=settings.recomputation.offload,
            ),
        ),
    )
    weights = "plain weights"
    if settings.quantization.method == "nf4":
        holding = FP8 if settings.compute == FP8 else settings.base_weights or STREAMED
        weights = f"NF4 weights, {_HOLDING[holding]} (by: {name_quantizer()})"
    return Trainer(
        accelerator=accelerator,
        model=fast,
        # Samples and exports run it in mixed precision, as on the other path.
        saved=accelerator.unwrap_model(accelerator.prepare(model)),
        optimizer=accelerator.prepare(FlatAdamW(fast.flat_adapter, settings.optimizer)),
        description=f"the fast path, {weights}",
        _release=fast.release,
        recompute_more=fast.recompute_more,
        stream_weights=fast.stream_weights,
    )


_HOLDING = {
    RESIDENT: "restored once and kept",
    STREAMED: "restored at each use",
    FP8: "restored once, rounded to 8 bits (fp8) and kept: other numerics than bfloat16's",
}
_MAKERS: Mapping[str, Callable[..., Trainer]] = {"reference": _make_reference, "fast": _make_fast}
