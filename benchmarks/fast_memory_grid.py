"""Device memory of the fast path, planned and measured: sizes of models, bases, recomputation, passes, objectives.

A cell is what a probe makes: the training loop's own steps on planned-like data, over a model of random weights that is
built on the device and quantized there, without files, planner or service (`memory_grid` has those). Prints a line a
cell with the parts of the prediction and writes JSON:

    PYTHONPATH=$PWD:$PWD/clients/python python -m benchmarks.fast_memory_grid --output fast-memory.json

About two minutes on an H100. On a CPU, where it only shows that the script works: `--device cpu --only tiny`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

# Before torch is imported; as the node's engines have it.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from google.protobuf import json_format

from benchmarks import random_models
from gpu_service.catalog import methods, optimizers, quantization
from gpu_service.domain.defaults import ResolvedHyperparameters, apply_defaults
from gpu_service.domain.device import Device
from gpu_service.domain.memory_estimate import MemoryEstimate, estimate_memory
from gpu_service.domain.memory_passes import ExampleSize, LargestPasses
from gpu_service.domain.planned_data import Example, ExampleReference, PlannedData
from gpu_service.domain.recomputation import NOTHING, Recomputation, everything, least_memory
from gpu_service.domain.spec import Hyperparameters, decode_message
from gpu_service.engine import devices
from gpu_service.engine.builders.methods import lora
from gpu_service.engine.request import DeviceChoice
from gpu_service.engine.trainers import make_trainer
from gpu_service.engine.training.batches import MicroBatchLimit, collate, split
from gpu_service.engine.training.flat_attention import attending_within_sequences
from gpu_service.engine.training.modes import measuring
from gpu_service.engine.training.objectives import make_objective
from tunesmith.common.v1 import training_spec_pb2

_WITHIN = 0.013
_STEPS = 2
_ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """`lengths` are the sequences of a step, of which the part `targets` carries loss; two are a pair with `dpo`."""

    size: str
    lengths: tuple[int, ...]
    base: str = "nf4"
    recomputation: Recomputation | str = NOTHING
    targets: float = 1.0
    rank: int = 16
    dropout: float = 0.0
    covers: tuple[str, ...] = _ALL_SEVEN
    objective: str = "sft"
    micro_batch_tokens: int | None = None
    # Evaluated before the steps: longer ones than are trained on.
    held_out: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        lengths = self.lengths
        same = len(set(lengths)) == 1
        recomputed = self.planned.describe(self.shape.layers).partition(": ")[2]
        parts = [
            self.size,
            self.base,
            f"{len(lengths)}x{lengths[0]}" if same else f"{sum(lengths)} in {len(lengths)}",
            recomputed,
            f"{self.targets:.0%}" if self.targets < 1 else "",
            f"rank{self.rank}" if self.rank != 16 else "",
            "dropout" if self.dropout else "",
            f"{len(self.covers)} kinds" if len(self.covers) < 7 else "",
            self.objective if self.objective != "sft" else "",
            f"passes of {self.micro_batch_tokens}" if self.micro_batch_tokens else "",
            "evaluation" if self.held_out else "",
        ]
        return "/".join(part for part in parts if part)

    @property
    def shape(self) -> random_models.Shape:
        return random_models.SHAPES[self.size]

    @property
    def planned(self) -> Recomputation:
        if isinstance(self.recomputation, Recomputation):
            return self.recomputation
        if self.recomputation == "least":
            return least_memory(self.shape.layers)
        return everything(self.shape.layers, offload=self.recomputation == "offload")


# Log-normal instruction lengths, 8,186 tokens.
MIXED = (
    213, 980, 122, 470, 333, 1210, 88, 640, 257, 391, 505, 150, 720, 289, 61, 410, 845, 178, 236, 88,
)  # fmt: skip
MIXED_16K = (*MIXED, *reversed(MIXED))

# Cells of one model and base stand together: it is built once.
CELLS: tuple[Cell, ...] = (
    Cell(size="tiny", lengths=(64, 32)),
    Cell(size="tiny", lengths=(64, 32), recomputation="all"),
    Cell(size="0.1B", lengths=(512,) * 16),
    Cell(size="0.1B", lengths=MIXED, recomputation="all"),
    Cell(size="0.1B", lengths=(2048,) * 4, base="bf16", targets=0.25),
    Cell(size="0.5B", lengths=MIXED, rank=64),
    Cell(size="0.5B", lengths=(8192,), recomputation="all", targets=0.5),
    Cell(size="1B", lengths=(2048,) * 4, base="bf16"),
    Cell(size="1B", lengths=MIXED, base="bf16", recomputation=Recomputation(full_layers=8)),
    Cell(size="1B", lengths=(2048,) * 4),
    Cell(size="1B", lengths=(512,) * 4, covers=("q_proj", "v_proj")),
    Cell(size="1B", lengths=MIXED, objective="dpo", recomputation=Recomputation(elementwise_layers=16)),
    Cell(size="1B", lengths=(1024,) * 4, held_out=(16384,), rank=128),
    Cell(size="1B", lengths=MIXED, dropout=0.1),
    Cell(size="3B", lengths=(2048,) * 4),
    Cell(size="3B", lengths=MIXED),
    Cell(size="3B", lengths=MIXED, base="nf4-kept"),
    Cell(size="3B", lengths=MIXED, recomputation=Recomputation(elementwise_layers=28)),
    Cell(size="3B", lengths=MIXED, recomputation=Recomputation(feed_forward_layers=14, elementwise_layers=14)),
    Cell(size="3B", lengths=MIXED, recomputation="all"),
    Cell(size="3B", lengths=(2048,) * 4, recomputation="all"),
    Cell(size="3B", lengths=MIXED, recomputation="offload"),
    Cell(size="3B", lengths=MIXED, recomputation="offload", micro_batch_tokens=2100),
    Cell(size="3B", lengths=MIXED, recomputation="least"),
    Cell(size="3B", lengths=(2048,) * 4, recomputation="least"),
    Cell(size="3B", lengths=MIXED, recomputation=Recomputation(full_layers=20, feed_forward_slices=8)),
    Cell(size="3B", lengths=(2048,) * 4, recomputation="least", held_out=(16384,), targets=0.25),
    Cell(size="3B", lengths=MIXED_16K, micro_batch_tokens=8200, objective="dpo", targets=0.5),
    Cell(size="8B", lengths=MIXED, base="bf16", recomputation=Recomputation(full_layers=20, feed_forward_layers=12)),
    Cell(size="8B", lengths=MIXED, base="nf4-kept"),
    Cell(size="8B", lengths=MIXED_16K, recomputation="all", targets=0.3),
    Cell(size="8B", lengths=MIXED_16K, recomputation=Recomputation(elementwise_layers=32)),
    # About as much as fits.
    Cell(size="8B", lengths=(2048,) * 8, recomputation=Recomputation(elementwise_layers=6)),
    Cell(size="8B", lengths=(*MIXED_16K, *MIXED[:12]), recomputation=Recomputation(elementwise_layers=32), rank=32),
)


@dataclass(kw_only=True)
class Result:
    """Bytes. `parts` are the plan's, `standing` what was there before the first pass and after the last step."""

    cell: str
    outcome: str = "measured"
    predicted: int = 0
    measured: int = 0
    ratio: float = 0.0
    parts: Mapping[str, int] = field(default_factory=dict)
    standing: tuple[int, int] = (0, 0)
    reserved: int = 0
    step_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Rows:
    """Stands in for planned data: examples in memory."""

    examples: list[Example]

    def example(self, reference: ExampleReference) -> Example:
        return self.examples[reference.example_index]


def measure(cell: Cell, base: Any, device: devices.Device) -> Result:
    """One cell on a base that was built for it; the base is as before afterwards."""
    start = time.monotonic()
    resolved = resolve(cell, device)
    result = Result(cell=cell.name)
    estimate = _predict(cell, resolved, device)
    result.predicted = estimate.peak_bytes
    names = ("weights", "adapter", "gradients", "optimizer", "activations", "overhead")
    result.parts = {name: getattr(estimate, f"{name}_bytes") for name in names}
    device.give_back()
    try:
        _run(cell, resolved, base, device, result)
    except torch.OutOfMemoryError:
        result.outcome = "ran_out"
    device.give_back()
    if result.measured:
        result.ratio = result.predicted / result.measured
    result.seconds = time.monotonic() - start
    return result


def _run(cell: Cell, resolved: ResolvedHyperparameters, base: Any, device: devices.Device, result: Result) -> None:
    settings = training_spec_pb2.Hyperparameters()
    json_format.ParseDict(resolved.to_json(), settings)
    model = lora.attach(base, "random", settings)
    try:
        trainer = make_trainer(model, settings, device.torch_device)
        try:
            _train(cell, settings, trainer, device, result)
        finally:
            trainer.release()
    finally:
        lora.detach(model)


def _train(cell: Cell, settings: Any, trainer: Any, device: devices.Device, result: Result) -> None:
    objective = make_objective(settings)
    data = draw(cell.lengths, cell)
    limit = MicroBatchLimit.of(settings.batch, trainer.saved.config)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.model.train()
    device.give_back()
    before = device.used_bytes()
    device.start_counting()
    with attending_within_sequences(trainer.model):
        if cell.held_out:
            held_out = draw(cell.held_out, cell)
            with measuring(trainer.model):
                objective.forward(trainer.model, collate(held_out, references(held_out)).to(device.torch_device))
        for _ in range(_STEPS):
            began = time.monotonic()
            for part in split(data, references(data), limit):
                outcome = objective.forward(trainer.model, collate(data, part).to(device.torch_device))
                trainer.accelerator.backward(outcome.total / 1000)
            norm = trainer.accelerator.clip_grad_norm_(trained, 1.0)
            torch.cat([outcome.values.flatten(), norm.double().reshape(1)]).tolist()
            del outcome
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
            result.step_seconds = time.monotonic() - began
    result.measured = device.peak_bytes()
    result.standing = (before, device.used_bytes())
    result.reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def draw(lengths: Sequence[int], cell: Cell) -> PlannedData:
    """Sequences of these lengths, with the cell's part of targets; every two a pair with `dpo`."""
    examples = []
    step = 2 if cell.objective == "dpo" else 1
    for first in range(0, len(lengths), step):
        mask: list[int] = []
        for length in lengths[first : first + step]:
            num_targets = max(round(length * cell.targets), 1)
            mask += [0] * (length - num_targets) + [1] * num_targets
        tokens = array("i", [(7 * place) % cell.shape.vocabulary for place in range(len(mask))])
        rejected_start = lengths[first] if step == 2 else 0
        examples.append(Example(tokens=memoryview(tokens), mask=memoryview(bytes(mask)), rejected_start=rejected_start))
    return cast(PlannedData, _Rows(examples))


def references(data: PlannedData) -> list[ExampleReference]:
    """Of every example of what `draw` gave."""
    return [ExampleReference(0, index) for index in range(len(cast(_Rows, data).examples))]


def resolve(cell: Cell, device: devices.Device) -> ResolvedHyperparameters:
    """A plan's settings for the cell, nothing of them chosen for the device."""
    method = methods.REGISTRY["lora" if cell.base == "bf16" else "qlora"]
    given = decode_message(
        Hyperparameters,
        {
            "batch": {
                "tokens": sum(cell.lengths),
                **({"micro_batch_tokens": cell.micro_batch_tokens} if cell.micro_batch_tokens else {}),
            },
            "lora": {"rank": cell.rank, "dropout": cell.dropout, "target_modules": list(cell.covers)},
            "objective": cell.objective,
            "max_length": max(cell.lengths),
            "trainer": "fast",
        },
        "hyperparameters",
    )
    resolved = apply_defaults(
        given,
        method=method,
        quantization=quantization.REGISTRY[method.quantizations[0]],
        target_modules=cell.covers,
        device=Device.from_json(device.describe()),
        length_limit=0,
        num_steps=_STEPS,
    )
    return replace(
        resolved,
        recomputation=cell.planned,
        base_weights=None if cell.base == "bf16" else "resident" if cell.base == "nf4-kept" else "streamed",
    )


def _predict(cell: Cell, resolved: ResolvedHyperparameters, device: devices.Device) -> MemoryEstimate:
    base = random_models.describe(cell.size)
    covered = tuple(layer for layer in base.linear_layers if layer.leaf in cell.covers)
    passes = LargestPasses(resolved.batch)
    for lengths, add in ((cell.lengths, passes.add_step), (cell.held_out, passes.add_evaluation)):
        data = draw(lengths, cell)
        examples = [data.example(reference) for reference in references(data)]
        add(
            [
                ExampleSize(
                    len(one.tokens),
                    sum(one.mask) - sum(one.mask[start] for start in {0, one.rejected_start}),
                    max(one.rejected_start, len(one.tokens) - one.rejected_start),
                )
                for one in examples
            ]
        )
    return estimate_memory(
        base,
        resolved,
        quantization.REGISTRY[resolved.quantization.method],
        optimizers.REGISTRY[resolved.optimizer.name],
        covered_layers=covered,
        num_trainable_parameters=sum(cell.rank * (layer.in_features + layer.out_features) for layer in covered),
        passes=passes,
        device=Device.from_json(device.describe()),
    )


def _describe(result: Result) -> str:
    gib = 1024**3
    parts = " ".join(f"{name[:4]} {size / gib:.2f}" for name, size in result.parts.items())
    standing = "/".join(f"{size / gib:.2f}" for size in result.standing)
    return (
        f"{result.cell:62} {result.outcome:8} predicted {result.predicted / gib:6.2f} measured "
        f"{result.measured / gib:6.2f} ratio {result.ratio:.4f} | {parts} | standing {standing} "
        f"reserved {result.reserved / gib:.2f} step {result.step_seconds:.2f} s, {result.seconds:.1f} s"
    )


def main() -> int:
    """Status 1 when a prediction is off by more than 1.3 %, or a cell ran out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="sizes, joined by commas; all but tiny when not given")
    parser.add_argument("--output", type=Path, help="where to write the JSON, after every cell")
    parser.add_argument("--limit-seconds", type=float, default=150.0, help="start no cell after this time")
    options = parser.parse_args()
    sizes = options.only.split(",") if options.only else [size for size in random_models.SHAPES if size != "tiny"]
    device = devices.select(DeviceChoice(type=options.device, index=0 if options.device == "cuda" else -1))
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    start = time.monotonic()
    results: list[Result] = []
    built: tuple[str, str] | None = None
    base: Any = None
    for cell in (cell for cell in CELLS if cell.size in sizes):
        if time.monotonic() - start > options.limit_seconds:
            print(f"{cell.name}: no time is left", flush=True)
            continue
        wanted = (cell.size, "bf16" if cell.base == "bf16" else "nf4")
        if built != wanted:
            base = None
            gc.collect()
            device.give_back()
            base = random_models.build(cell.size, device.torch_device, in_nf4=wanted[1] == "nf4")
            built = wanted
        results.append(measure(cell, base, device))
        print(_describe(results[-1]), flush=True)
        if options.output is not None:
            document = {"device": name, "torch": torch.__version__, "cells": [asdict(result) for result in results]}
            options.output.write_text(json.dumps(document, indent=1), encoding="utf-8")
    off = [abs(result.ratio - 1) for result in results if result.outcome == "measured"]
    ran_out = sum(result.outcome == "ran_out" for result in results)
    print(
        f"{len(results)} cells in {time.monotonic() - start:.0f} s, {ran_out} ran out, "
        f"{sum(one > _WITHIN for one in off)} off by more than {_WITHIN:.1%}, worst {max(off, default=0):.2%}"
    )
    return 1 if ran_out or any(one > _WITHIN for one in off) else 0


if __name__ == "__main__":
    sys.exit(main())
