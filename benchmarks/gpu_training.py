"""Training throughput of the fast path and of the plain path on one GPU, on random weights of a real shape.

One step is what the training loop does between two events: batch to the device, forward, backward, clipping, optimizer,
losses read back as the loop reads them: on the fast path one step late, and timed on the device from one step's end to
the next's. Real tokens are counted, never padding; nothing here is padded. Beside each row of the fast path stands its
parity: the first batch's loss under the plain path on the same weights, and how far the gradients of a shorter batch
are apart. A speed without its parity does not count.

    python -m benchmarks.gpu_training --row dense mixed --path fast reference --base nf4 --out rows.json
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_models import SHAPES, Shape
from gpu_service.domain.planned_data import Example, ExampleReference
from gpu_service.engine.builders.methods import lora, qlora
from gpu_service.engine.builders.optimizers import adamw
from gpu_service.engine.builders.quantization import nf4
from gpu_service.engine.failures import library_versions
from gpu_service.engine.fast_path.attention_choice import AttentionChoice
from gpu_service.engine.fast_path.flat_adamw import FlatAdamW
from gpu_service.engine.fast_path.model import FastModel, FastSettings
from gpu_service.engine.training.accelerator import make_accelerator
from gpu_service.engine.training.batches import MicroBatch, collate
from gpu_service.engine.training.clipping import clip_gradient
from gpu_service.engine.training.flat_attention import attending_within_sequences
from gpu_service.engine.training.modes import measuring
from gpu_service.engine.training.objectives.sft import Likelihood
from gpu_service.engine.training.updates import StepNumbers, make_updates
from tunesmith.common.v1 import training_spec_pb2

# `nf4`: restored at each use; `nf4-kept`: the same values restored once and kept; `fp8`: those rounded to 8 bits, other
# numerics; `bf16`: never quantized.
BASES = ("nf4", "nf4-kept", "fp8", "bf16")
_DENSE_LENGTH = 2048
_MEDIAN, _SIGMA, _SHORTEST = 350, 0.8, 32
_GRADIENT_PARITY_TOKENS = 2048


@dataclass(frozen=True)
class _Rows:
    """Stands in for planned data: examples in memory."""

    examples: list[Example]

    def example(self, reference: ExampleReference) -> Example:
        return self.examples[reference.example_index]


def make_steps(row: str, tokens: int, count: int, vocabulary: int, seed: int) -> list[MicroBatch]:
    """`count` batches of at most `tokens` tokens: rows of 2,048, or instruction lengths (log-normal), first fit."""
    draw = random.Random(seed)
    steps: list[list[int]] = [[] for _ in range(count)]
    if row == "dense":
        steps = [[_DENSE_LENGTH] * (tokens // _DENSE_LENGTH) for _ in steps]
    else:
        misses = 0
        while misses < 4 * count:
            length = min(max(round(draw.lognormvariate(math.log(_MEDIAN), _SIGMA)), _SHORTEST), _DENSE_LENGTH)
            place = next((one for one in steps if sum(one) + length <= tokens), None)
            if place is None:
                misses += 1
            else:
                place.append(length)
    batches = []
    for lengths in steps:
        data = _Rows([_example([draw.randrange(vocabulary) for _ in range(length)]) for length in lengths])
        batches.append(collate(data, [ExampleReference(0, index) for index in range(len(lengths))]))  # type: ignore[arg-type]
    return batches


def _example(tokens: list[int]) -> Example:
    return Example(tokens=memoryview(array("i", tokens)), mask=memoryview(bytes([0, *[1] * (len(tokens) - 1)])))


@cache
def draw_weights(shape: Shape) -> Mapping[str, torch.Tensor]:
    """Random weights in bfloat16 on the host, the same for every row."""
    torch.manual_seed(0)
    return {
        name: torch.ones(sizes, dtype=torch.bfloat16)
        if len(sizes) == 1
        else torch.empty(sizes, dtype=torch.bfloat16, device="cuda").normal_(std=0.02).cpu()
        for name, sizes in shape.tensors()
    }


def make_model(shape: Shape, base: str, settings: training_spec_pb2.Hyperparameters) -> Any:
    """A PEFT model of random weights on the GPU, made by the engine's own builders."""
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
    quantized = base != "bf16"
    quantization = nf4.build_config(double_quantization=True, compute_dtype=torch.bfloat16) if quantized else None
    model = LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=dict(draw_weights(shape)),
        dtype=torch.bfloat16,
        device_map={"": "cuda:0"},
        quantization_config=quantization,
    )
    if quantized:
        qlora.prepare_base(model)
    attached = lora.attach(model, "random", settings)
    with torch.no_grad():
        # B of zeros has A's gradients zero: parity would say nothing of them.
        for name, parameter in attached.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    return attached


def measure(
    arguments: argparse.Namespace, row: str, path: str, base: str, settings: training_spec_pb2.Hyperparameters
) -> dict[str, Any]:
    """One row: throughput, peak memory, parity."""
    shape = SHAPES[arguments.shape]
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    accelerator = make_accelerator(device, torch.bfloat16)
    start = time.perf_counter()
    model = make_model(shape, base, settings)
    torch.cuda.synchronize()
    load_seconds = time.perf_counter() - start
    batches = make_steps(row, arguments.tokens, arguments.distinct, shape.vocabulary, seed=1)
    objective = Likelihood()
    parity: dict[str, float] = {}
    if path == "fast":
        fast = FastModel(
            model,
            FastSettings(
                device=device,
                compute_dtype=torch.bfloat16,
                keeps_weights=base == "nf4-kept",
                in_fp8=base == "fp8",
                recomputes=arguments.recompute,
                records=not arguments.launched,
            ),
        )
        wait_for_attention(fast, shape)
        parity = compare(fast, accelerator.prepare(model), batches[0], shape.vocabulary, objective)
        trained: Any = fast
        optimizer = accelerator.prepare(FlatAdamW(fast.flat_adapter, settings.optimizer))
    else:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained, optimizer = accelerator.prepare(model, adamw.build(parameters, settings.optimizer))
    trained.train()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    stepper = Stepper(accelerator=accelerator, model=trained, optimizer=optimizer, settings=settings)
    seconds, losses, tokens = [], [], []
    with attending_within_sequences(trained):
        order = [batches[number % len(batches)] for number in range(arguments.warmup + arguments.steps)]
        for batch, (loss, numbers) in zip(order, stepper.run(order), strict=True):
            losses.append(loss)
            seconds.append(numbers.seconds)
            tokens.append(batch.num_tokens)
        profiled = profile(stepper, batches) if arguments.profile else {}
    seconds, tokens = seconds[arguments.warmup :], tokens[arguments.warmup :]
    rates = sorted(count / took for count, took in zip(tokens, seconds, strict=True))
    return {
        "row": row,
        "path": path,
        "base": base,
        "shape": arguments.shape,
        "recompute": arguments.recompute,
        "notices": trained.take_notices() if path == "fast" else [],
        "tokens_per_second": round(statistics.median(rates)),
        "tokens_per_second_p10_p90": [round(rates[len(rates) // 10]), round(rates[-1 - len(rates) // 10])],
        "tokens_per_second_overall": round(sum(tokens) / sum(seconds)),
        "step_milliseconds": round(1000 * statistics.median(seconds), 1),
        "step_tokens": round(statistics.mean(tokens)),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "load_seconds": round(load_seconds, 2),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "parity": parity,
        "profile": profiled,
    }


def wait_for_attention(fast: FastModel, shape: Shape) -> None:
    """Until FlashAttention-4 is ready, where it is installed: a run does not wait for it."""
    if isinstance(fast.attention, AttentionChoice):
        query, key = (
            torch.empty(1, heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)
            for heads in (shape.heads, shape.key_value_heads)
        )
        fast.attention.prepare(query, key, waits=True)


class Stepper:
    """Steps of the training loop, without its reporting."""

    def __init__(
        self, *, accelerator: Any, model: Any, optimizer: Any, settings: training_spec_pb2.Hyperparameters
    ) -> None:
        self._accelerator = accelerator
        self._model = model
        self._optimizer = optimizer
        self._limit = settings.optimizer.max_gradient_norm
        self._objective = Likelihood()
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.updates = make_updates(accelerator=accelerator, optimizer=optimizer, halts=True)

    def issue(self, batch: MicroBatch) -> Callable[[], StepNumbers]:
        """Hand one step to the device; what is given reads its numbers."""
        self.updates.begin()
        weight = sum(self._objective.weights(batch))
        outcome = self._objective.forward(self._model, batch.to(self._accelerator.device))
        self._accelerator.backward(outcome.total / weight)
        norm = clip_gradient(self._accelerator, self._optimizer, self._parameters, self._limit)
        return self.updates.apply([outcome.values], norm, weight)

    def run(self, batches: Sequence[MicroBatch]) -> Iterator[tuple[float, StepNumbers]]:
        """Loss and numbers of each step, in order, read as late as the loop reads them."""
        waiting: deque[tuple[MicroBatch, Callable[[], StepNumbers]]] = deque()
        for number in range(len(batches) + self.updates.steps_ahead):
            if number < len(batches):
                waiting.append((batches[number], self.issue(batches[number])))
            if number >= self.updates.steps_ahead:
                batch, read = waiting.popleft()
                numbers = read()
                yield sum(row[0] for row in numbers.rows) / sum(self._objective.weights(batch)), numbers


def compare(fast: FastModel, plain: Any, batch: MicroBatch, vocabulary: int, objective: Likelihood) -> dict[str, float]:
    """Loss of a batch under both paths, and the gradients of a shorter one, on the same weights."""
    weight = sum(objective.weights(batch))
    device = torch.device("cuda", 0)
    with measuring(plain), attending_within_sequences(plain):
        expected = float(objective.forward(plain, batch.to(device)).total) / weight
    with measuring(fast):
        found = float(objective.forward(fast, batch.to(device)).total) / weight
    (short,) = make_steps("dense", _GRADIENT_PARITY_TOKENS, 1, vocabulary, seed=2)
    exact = _exact_gradient(plain, short, objective)
    theirs = _plain_gradient(plain, short, objective)
    (flat,) = torch.autograd.grad(objective.forward(fast, short.to(device)).total, [fast.adapter])
    ours = torch.cat([view.flatten() for view in fast.flat_adapter.views(flat)])
    return {
        "loss": found,
        "reference_loss": expected,
        "relative_loss_difference": abs(found - expected) / abs(expected),
        "gradient_error": float((ours - exact).norm() / exact.norm()),
        "reference_gradient_error": float((theirs - exact).norm() / exact.norm()),
    }


def _plain_gradient(plain: Any, batch: MicroBatch, objective: Likelihood) -> torch.Tensor:
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    plain.train()
    with attending_within_sequences(plain):
        gradients = torch.autograd.grad(objective.forward(plain, batch.to(torch.device("cuda", 0))).total, trained)
    return torch.cat([gradient.flatten() for gradient in gradients])


def _exact_gradient(plain: Any, batch: MicroBatch, objective: Likelihood) -> torch.Tensor:
    """The same from float32 throughout, over the same base: the weights stay as they are quantized or rounded."""
    from bitsandbytes.nn import Linear4bit

    forward = plain.forward
    held = [module for module in plain.modules() if isinstance(module, Linear4bit)]
    changed = [
        parameter
        for parameter in plain.parameters()
        if parameter.dtype is torch.bfloat16 and not hasattr(parameter, "quant_state")
    ]
    before = [parameter.data for parameter in changed]
    try:
        # accelerate's autocast lies around the model's own.
        plain.forward = plain._original_forward
        for module in held:
            module.compute_dtype = torch.float32
        for parameter in changed:
            parameter.data = parameter.data.float()
        return _plain_gradient(plain, batch, objective)
    finally:
        plain.forward = forward
        for module in held:
            module.compute_dtype = torch.bfloat16
        for parameter, data in zip(changed, before, strict=True):
            parameter.data = data


def profile(stepper: Stepper, batches: list[MicroBatch]) -> dict[str, Any]:
    """GPU milliseconds a step by kernel, the largest first, over three steps that are not counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        list(stepper.run(batches[:3]))
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    rows = [(event.self_device_time_total / 3000, event.count / 3, event.key) for event in profiler.key_averages()]
    rows.sort(reverse=True)
    return {
        "wall_milliseconds": round(wall / 3 * 1000, 1),
        "kernel_milliseconds": round(sum(row[0] for row in rows), 1),
        "kernels": [{"ms": round(ms, 2), "launches": round(n, 1), "name": name[:90]} for ms, n, name in rows[:25]],
    }


def make_settings(arguments: argparse.Namespace) -> training_spec_pb2.Hyperparameters:
    """What every row trains with: LoRA of rank 16 on all seven linears."""
    return training_spec_pb2.Hyperparameters(
        lora=training_spec_pb2.Lora(
            rank=16,
            alpha=16,
            dropout=0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
        optimizer=training_spec_pb2.Optimizer(
            learning_rate=2e-4, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0, max_gradient_norm=1.0
        ),
        gradient_checkpointing=arguments.recompute,
    )


def main() -> None:
    """Measure every combination asked for; one JSON document, and a table on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", nargs="+", choices=("dense", "mixed"), default=["dense"])
    parser.add_argument("--path", nargs="+", choices=("fast", "reference"), default=["fast"])
    parser.add_argument("--base", nargs="+", choices=BASES, default=["nf4"])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="3B")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--distinct", type=int, default=12, help="different batches that steps go through in turn")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--launched", action="store_true", help="no pass is recorded and played again")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    settings = make_settings(arguments)
    rows = []
    for base in arguments.base:
        for row in arguments.row:
            for path in arguments.path:
                measured = measure(arguments, row, path, base, settings)
                rows.append(measured)
                print(json.dumps(measured), flush=True)
    document = {
        "device": torch.cuda.get_device_name(0),
        "versions": dict(library_versions()),
        "settings": {"tokens": arguments.tokens, "steps": arguments.steps, "warmup": arguments.warmup},
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
