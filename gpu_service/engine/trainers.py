"""Makes what trains: transformers and PEFT under accelerate, or the fast path. The plan has decided which.

Knows what the loop, checkpoints and exports ask of either; what a step is, the loop knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from gpu_service.catalog import optimizers
from gpu_service.domain.defaults import FP8, LOW, RESIDENT, STREAMED
from gpu_service.domain.recomputation import Recomputation, everything
from gpu_service.domain.trainer import adds_up_passes
from gpu_service.engine.fast_path.flat_adamw import FlatAdamW
from gpu_service.engine.fast_path.model import FastModel, FastSettings
from gpu_service.engine.fast_path.nf4 import name_quantizer
from gpu_service.engine.lean.method import LeanAdapted
from gpu_service.engine.precision import DTYPES
from gpu_service.engine.training.accelerator import LeanAccelerator, make_accelerator
from tunesmith.common.v1 import training_spec_pb2

if TYPE_CHECKING:
    from gpu_service.engine.fast_path.full_model import FullModel


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
    # Gradients of several passes cannot add up to a step's.
    is_one_pass: bool = False
    # Lets go of quantized weights that stand restored: likewise.
    stream_weights: Callable[[], str] = lambda: ""
    # The last resort, where passes cannot be smaller: gradients that add up with less precision, in words, or empty.
    narrow_gradients: Callable[[], str] = lambda: ""
    # Lets go of recorded passes and the memory that they have of their own: likewise, and the plan knows none of it.
    give_up_recordings: Callable[[], str] = lambda: ""

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
    if not settings.HasField("lora"):
        return _make_full(model, settings, device, accelerator)
    fast = FastModel(
        model,
        FastSettings(
            device=device,
            compute_dtype=DTYPES[settings.quantization.compute_dtype],
            keeps_weights=settings.base_weights == RESIDENT,
            in_fp8=settings.compute == FP8,
            # A plan says it by layer.
            recomputes=settings.gradient_checkpointing and not settings.HasField("recomputation"),
            recomputation=_recomputation(settings),
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
        give_up_recordings=fast.give_up_recordings,
    )


def _make_full(
    model: Any, settings: training_spec_pb2.Hyperparameters, device: torch.device, accelerator: Any
) -> Trainer:
    # A new engine's first run waits for what is imported at the top, and few train every weight.
    from gpu_service.engine.fast_path.consuming_adamw import ConsumingAdamW
    from gpu_service.engine.fast_path.full_adamw import FullAdamW
    from gpu_service.engine.fast_path.full_low_memory import LowMemoryModel
    from gpu_service.engine.fast_path.full_model import FullModel, FullSettings

    compute_dtype = DTYPES[settings.quantization.compute_dtype]
    batch = settings.batch
    accumulates = adds_up_passes(
        examples=batch.examples,
        tokens=batch.tokens,
        micro_batch_examples=batch.micro_batch_examples,
        micro_batch_tokens=batch.micro_batch_tokens,
    )
    full: FullModel
    optimizer: torch.optim.Optimizer
    if settings.full_memory == LOW:
        recomputation = everything(len(model.model.layers))
        full = low = LowMemoryModel(
            model, FullSettings(device=device, compute_dtype=compute_dtype, recomputation=recomputation)
        )
        optimizer = ConsumingAdamW(low, settings.optimizer, seed=settings.seed)
        described = "held in bfloat16 and stepped with moments of 8 bits, both rounded by chance; no gradient is kept"
    else:
        full = FullModel(
            model,
            FullSettings(
                device=device,
                compute_dtype=compute_dtype,
                accumulates=accumulates,
                recomputation=_recomputation(settings),
            ),
        )
        optimizer = FullAdamW(full.weights, full.gradients, settings.optimizer)
        described = "held in float32"
    if device.type == "cuda":
        # The pieces that the weights were in are too small for what comes.
        torch.cuda.empty_cache()
    return Trainer(
        accelerator=accelerator,
        model=full,
        saved=accelerator.unwrap_model(accelerator.prepare(model)),
        optimizer=optimizer,
        description=f"the fast path, every weight, {described}",
        _release=full.release,
        recompute_more=full.recompute_more,
        narrow_gradients=full.narrow_gradients,
        is_one_pass=settings.full_memory == LOW,
    )


def _recomputation(settings: training_spec_pb2.Hyperparameters) -> Recomputation:
    return Recomputation(
        full_layers=settings.recomputation.full_layers,
        feed_forward_layers=settings.recomputation.feed_forward_layers,
        elementwise_layers=settings.recomputation.elementwise_layers,
        offload=settings.recomputation.offload,
        # Plans from before there were slices have none.
        feed_forward_slices=max(settings.recomputation.feed_forward_slices, 1),
    )


_HOLDING = {
    RESIDENT: "restored once and kept",
    STREAMED: "restored at each use",
    FP8: "restored once, rounded to 8 bits (fp8) and kept: other numerics than bfloat16's",
}
_MAKERS: Mapping[str, Callable[..., Trainer]] = {"reference": _make_reference, "fast": _make_fast}
