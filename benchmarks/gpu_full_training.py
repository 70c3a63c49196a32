"""Throughput and memory of full fine-tuning on one GPU, every weight trained, on random weights of a real shape.

The counterpart of `benchmarks.gpu_training`, which makes the steps. Parity: the first batch's loss under transformers
on the same weights in mixed precision, and how far the gradients of a shorter batch lie from those of float32, ours
beside those of mixed precision. A speed without its parity does not count.

    python -m benchmarks.gpu_full_training --row dense mixed --out rows.json
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_training import Stepper, make_steps, profile
from benchmarks.random_models import SHAPES, Shape
from gpu_service.domain.defaults import LOW, STANDARD
from gpu_service.domain.recomputation import Recomputation
from gpu_service.engine.builders.methods import full
from gpu_service.engine.failures import library_versions
from gpu_service.engine.fast_path.full_low_memory import LowMemoryModel
from gpu_service.engine.fast_path.full_model import FullModel
from gpu_service.engine.fast_path.full_weights import Region
from gpu_service.engine.trainers import Trainer, make_trainer
from gpu_service.engine.training.batches import MicroBatch
from gpu_service.engine.training.flat_attention import attending_within_sequences
from gpu_service.engine.training.modes import measuring
from gpu_service.engine.training.objectives.sft import Likelihood
from tunesmith.common.v1 import training_spec_pb2

# Few enough for float32 beside all that a training holds.
_PARITY_TOKENS = 1024
_DEVICE = torch.device("cuda", 0)
# What is recomputed, of so many layers.
_RECOMPUTATIONS: Mapping[str, Any] = {
    "nothing": lambda layers: Recomputation(),
    "elementwise": lambda layers: Recomputation(elementwise_layers=layers),
    "everything": lambda layers: Recomputation(full_layers=layers),
}


def make_model(shape: Shape, dtype: torch.dtype) -> Any:
    """transformers' model of random weights in a type, every weight trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=32768,
        rope_theta=500000.0,
    )
    torch.manual_seed(0)
    with torch.device("cuda", 0):
        model = LlamaForCausalLM(config).to(dtype)
    return full.attach(model, "random", training_spec_pb2.Hyperparameters())


def make_settings(layers: int, arguments: argparse.Namespace) -> training_spec_pb2.Hyperparameters:
    """As a plan resolves them."""
    recomputation = _RECOMPUTATIONS[arguments.recompute](layers)
    batch = training_spec_pb2.Batch(tokens=arguments.tokens)
    if arguments.accumulates:
        batch.micro_batch_tokens = arguments.tokens // 2
    return training_spec_pb2.Hyperparameters(
        trainer="fast",
        full_memory=arguments.memory,
        quantization=training_spec_pb2.Quantization(method="none", compute_dtype="bfloat16"),
        batch=batch,
        optimizer=training_spec_pb2.Optimizer(
            name="adamw",
            learning_rate=2e-5,
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            weight_decay=0.0,
            max_gradient_norm=1.0,
        ),
        recomputation=training_spec_pb2.Recomputation(
            full_layers=recomputation.full_layers, elementwise_layers=recomputation.elementwise_layers
        ),
    )


def compare(trainer: Trainer, model: Any, batch: MicroBatch, vocabulary: int) -> dict[str, float]:
    """Loss of a batch, and the gradients of a shorter one, against transformers' on the same weights."""
    objective, fast = Likelihood(), trainer.model
    assert isinstance(fast, FullModel)
    weight = sum(objective.weights(batch))
    losses = []
    for one in (fast, trainer.saved):
        with measuring(one), attending_within_sequences(one), torch.autocast("cuda", torch.bfloat16):
            losses.append(float(objective.forward(one, batch.to(_DEVICE)).total) / weight)
    (short,) = make_steps("mixed", _PARITY_TOKENS, 1, vocabulary, seed=2)
    exact = _exact_gradients(model, short)
    reference_error = _error(_plain_gradients(model, short, mixed=True), exact)
    torch.autograd.backward(objective.forward(fast, short.to(_DEVICE)).total)
    if isinstance(fast, LowMemoryModel):
        flat = _gather(fast)
    else:
        flat = fast.gradients.flat
        fast.gradients.drop()
    ours = [fast.weights.region(one).view(flat) for one in model.parameters()]
    return {
        "loss": losses[0],
        "reference_loss": losses[1],
        "relative_loss_difference": abs(losses[0] - losses[1]) / abs(losses[1]),
        "gradient_error": _error(ours, exact),
        "reference_gradient_error": reference_error,
    }


def _gather(fast: LowMemoryModel) -> torch.Tensor:
    """All gradients of the pass that was made, which are otherwise let go of one by one."""
    flat = torch.empty_like(fast.weights.held)

    def consume(region: Region, gradient: torch.Tensor) -> None:
        flat[region.start : region.stop].copy_(gradient.flatten())

    fast.sweep(consume, is_last=True)
    return flat


def _exact_gradients(model: Any, batch: MicroBatch) -> list[torch.Tensor]:
    """From float32 throughout, whatever weights are held in; on the host, as the device has no room for several."""
    before = [parameter.data for parameter in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        return [one.cpu() for one in _plain_gradients(model, batch, mixed=False)]
    finally:
        for parameter, data in zip(model.parameters(), before, strict=True):
            parameter.data = data


def _plain_gradients(model: Any, batch: MicroBatch, *, mixed: bool) -> list[torch.Tensor]:
    forward = model.forward
    # accelerate's autocast lies around the model's own.
    model.forward = model._original_forward
    try:
        with attending_within_sequences(model), torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            total = Likelihood().forward(model, batch.to(_DEVICE)).total
        return list(torch.autograd.grad(total, list(model.parameters())))
    finally:
        model.forward = forward


def _error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    apart = torch.stack(
        [(ours.float() - theirs.to(ours.device)).norm() for ours, theirs in zip(found, exact, strict=True)]
    ).norm()
    return float(apart.cpu() / torch.stack([one.norm() for one in exact]).norm())


def measure(arguments: argparse.Namespace, row: str, *, compares: bool) -> dict[str, Any]:
    """One row: throughput, peak memory, and parity if it `compares`."""
    # Two trainings do not fit the device.
    gc.collect()
    torch.cuda.empty_cache()
    shape = SHAPES[arguments.shape]
    settings = make_settings(shape.layers, arguments)
    model = make_model(shape, torch.bfloat16 if arguments.memory == LOW else torch.float32)
    trainer = make_trainer(model, settings, _DEVICE)
    batches = make_steps(row, arguments.tokens, arguments.distinct, shape.vocabulary, seed=1)
    parity = compare(trainer, model, batches[0], shape.vocabulary) if compares else {}
    trainer.model.train()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    stepper = Stepper(
        accelerator=trainer.accelerator, model=trainer.model, optimizer=trainer.optimizer, settings=settings
    )
    order = [batches[number % len(batches)] for number in range(arguments.warmup + arguments.steps)]
    losses, norms, rates = [], [], []
    for batch, (loss, numbers) in zip(order, stepper.run(order), strict=True):
        losses.append(loss)
        norms.append(numbers.norm)
        rates.append(batch.num_tokens / numbers.seconds)
    counted = sorted(rates[arguments.warmup :])
    peak_gib = torch.cuda.max_memory_allocated() / 2**30
    profiled = profile(stepper, batches) if arguments.profile else {}
    trainer.release()
    return {
        "row": row,
        "shape": arguments.shape,
        "memory": arguments.memory,
        "recompute": arguments.recompute,
        "tokens_per_second": round(statistics.median(counted)),
        "tokens_per_second_p10_p90": [round(counted[len(counted) // 10]), round(counted[-1 - len(counted) // 10])],
        "step_tokens": round(statistics.mean(batch.num_tokens for batch in order)),
        "peak_gib": round(peak_gib, 2),
        "losses": [round(loss, 5) for loss in (losses[0], losses[-1])],
        "norms": [round(norm, 5) for norm in (norms[0], norms[-1])],
        "parity": parity,
        "profile": profiled,
    }


def main() -> None:
    """Measure every row asked for; one JSON document, and a line a row on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs="+", choices=("dense", "mixed"), default=["dense"])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="3B")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--distinct", type=int, default=12, help="different batches that steps go through in turn")
    parser.add_argument("--memory", choices=(STANDARD, LOW), default=STANDARD)
    parser.add_argument("--recompute", choices=tuple(_RECOMPUTATIONS), default="nothing")
    parser.add_argument("--accumulates", action="store_true", help="gradients in float32, as for steps of many passes")
    parser.add_argument("--parity", action="store_true", help="loss and gradients of the first row")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for row in arguments.row:
        # Parity takes longer than a row, and is the same for all.
        rows.append(measure(arguments, row, compares=arguments.parity and not rows))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        document = {
            "device": torch.cuda.get_device_name(0),
            "versions": dict(library_versions()),
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
