"""Device memory as planned and as it comes to, over sizes of models, methods, lengths and batches.

Each cell is a real run of the engine (planner, loading, training loop) in this process on a model of random weights,
cancelled after its third step so that nothing is saved. Prints a line a cell and writes JSON:

    PYTHONPATH=$PWD:$PWD/clients/python python -m benchmarks.memory_grid --output memory-grid.json

About seven minutes on an H100, with 35 GB of disk and 60 GB of host memory. On a CPU the peak is the whole process', so
that each cell has one of its own there; about five minutes on two cores:

    PYTHONPATH=$PWD:$PWD/clients/python python -m benchmarks.memory_grid --device cpu --output memory-cpu.json
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Before torch is imported; as the node's engines have it.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})

import torch

from benchmarks import random_models
from gpu_service.catalog import optimizers
from gpu_service.engine import devices
from gpu_service.engine.request import DeviceChoice
from gpu_service.engine.resident import BaseShelf
from gpu_service.engine.service import carry_out
from gpu_service.engine.stopping import StopMode, StopSwitch
from gpu_service.journal import Reader
from tunesmith.common.v1 import errors_pb2, event_pb2

_STEPS = 3
# A CPU's heap has other holes in each run.
_WITHIN = {"cuda": 0.10, "cpu": 0.15}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the grid: `examples` of `length` tokens in a single pass, of which `targets` (0 to 1) carry loss."""

    size: str
    training_type: str
    length: int
    examples: int = 1
    quantization: str = ""
    checkpointing: bool = False
    targets: float = 1.0
    rank: int = 16
    optimizer: str = "adamw"
    compute_dtype: str = ""
    trainer: str = "reference"

    @property
    def name(self) -> str:
        parts = [
            self.size,
            self.training_type,
            self.quantization or {"qlora": "nf4"}.get(self.training_type, "none"),
            f"{self.examples}x{self.length}",
            "checkpointing" if self.checkpointing else "",
            f"{self.targets:.0%}" if self.targets < 1 else "",
            f"rank{self.rank}" if self.rank != 16 else "",
            self.optimizer if self.optimizer != "adamw" else "",
            self.compute_dtype,
            self.trainer if self.trainer != "reference" else "",
        ]
        return "/".join(part for part in parts if part)


# Cells of one model and quantization stand together: the engine keeps the base between them.
CELLS: tuple[Cell, ...] = (
    Cell(size="0.1B", training_type="full", length=512, examples=8),
    Cell(size="0.1B", training_type="full", length=2048, examples=4),
    Cell(size="0.1B", training_type="lora", length=2048, examples=4),
    Cell(size="0.1B", training_type="qlora", length=1024, examples=8),
    Cell(size="0.5B", training_type="full", length=1024, examples=4),
    Cell(size="0.5B", training_type="lora", length=4096, examples=2),
    Cell(size="0.5B", training_type="qlora", length=2048, examples=4, targets=0.25),
    Cell(size="0.5B", training_type="qlora", length=8192, checkpointing=True, targets=0.5),
    Cell(size="1B", training_type="full", length=1024, examples=2),
    Cell(size="1B", training_type="full", length=2048, examples=4, checkpointing=True),
    Cell(size="1B", training_type="full", length=1024, examples=2, optimizer="adamw-8bit"),
    Cell(size="1B", training_type="lora", length=2048, examples=4),
    Cell(size="1B", training_type="lora", length=2048, examples=4, checkpointing=True, rank=128),
    Cell(size="1B", training_type="qlora", length=512, examples=8),
    Cell(size="1B", training_type="qlora", length=2048, examples=4),
    Cell(size="1B", training_type="qlora", length=2048, compute_dtype="float32", targets=0.5),
    Cell(size="1B", training_type="qlora", quantization="int8", length=2048, examples=2),
    Cell(size="3B", training_type="full", length=512, examples=2, checkpointing=True),
    Cell(size="3B", training_type="lora", length=2048, examples=2),
    Cell(size="3B", training_type="lora", length=4096, examples=2, checkpointing=True),
    Cell(size="3B", training_type="qlora", length=1024),
    Cell(size="3B", training_type="qlora", length=2048, examples=4, targets=0.5),
    Cell(size="3B", training_type="qlora", length=4096),
    Cell(size="3B", training_type="qlora", quantization="fp4", length=2048, examples=2, rank=64),
    # `fast_memory_grid` has many more of the fast path, without planner and loading.
    Cell(size="3B", training_type="qlora", length=2048, examples=4, trainer="fast"),
    Cell(size="3B", training_type="qlora", length=2048, examples=4, checkpointing=True, trainer="fast"),
    Cell(size="3B", training_type="lora", length=2048, examples=2, targets=0.5, trainer="fast"),
    Cell(size="8B", training_type="full", length=512),
    Cell(size="8B", training_type="qlora", length=512),
    Cell(size="8B", training_type="qlora", length=2048),
    Cell(size="8B", training_type="qlora", length=2048, examples=4, checkpointing=True),
    Cell(size="8B", training_type="qlora", length=8192, checkpointing=True, targets=0.5),
    Cell(size="8B", training_type="lora", length=2048),
    Cell(size="8B", training_type="lora", length=2048, examples=2, targets=0.5),
    Cell(size="8B", training_type="lora", length=4096, examples=2, checkpointing=True),
    # As much as fits, and a little more than does.
    Cell(size="8B", training_type="lora", length=7168),
    Cell(size="8B", training_type="lora", length=8192),
)


# Of a shape that a CPU trains in seconds: passes of few and of many tokens, recomputed and not.
CPU_CELLS: tuple[Cell, ...] = (
    Cell(size="135M", training_type="qlora", length=80, examples=4, rank=8),
    Cell(size="135M", training_type="qlora", length=80, examples=16, rank=8),
    Cell(size="135M", training_type="qlora", length=80, examples=16, rank=8, checkpointing=True),
    Cell(size="135M", training_type="qlora", length=80, rank=8, targets=0.5),
    Cell(size="135M", training_type="lora", length=80, examples=4, rank=8),
    Cell(size="135M", training_type="lora", length=80, examples=16, rank=8),
    Cell(size="135M", training_type="full", length=80, examples=4),
)


@dataclass(kw_only=True)
class Result:
    """What came of a cell; bytes. `outcome`: `measured`, `refused` (the plan), `ran_out` or `failed`."""

    cell: str
    # The cell's own facts.
    facts: Mapping[str, Any] = field(default_factory=dict)
    outcome: str = "failed"
    reason: str = ""
    predicted: int = 0
    measured: int = 0
    error: float = 0.0
    plan: Mapping[str, Any] = field(default_factory=dict)
    # Allocated when training began, then after each step; reserved at most; of the driver and its libraries.
    loaded: int = 0
    after_steps: list[int] = field(default_factory=list)
    reserved: int = 0
    context: int = 0
    seconds: float = 0.0


class _Observer:
    """Hears the engine's notices in its own thread: measures what stands, and cancels after the last wanted step."""

    def __init__(self, device: devices.Device) -> None:
        self.switch = StopSwitch()
        self.loaded = 0
        self.after_steps: list[int] = []
        self._device = device
        self._training = False

    def __call__(self, notice: Mapping[str, Any]) -> None:
        if notice["type"] == "phase":
            self._training = notice["phase"] == "TRAINING"
            if self._training and not self.loaded:
                self.loaded = self._device.used_bytes()
        elif self._training and len(self.after_steps) < _STEPS:
            self.after_steps.append(self._device.used_bytes())
            if len(self.after_steps) == _STEPS:
                self.switch.request(StopMode.CANCEL)


def measure(cell: Cell, root: Path, model: str, device: Mapping[str, Any], shelf: BaseShelf) -> Result:
    """One run. Failures are results."""
    start = time.monotonic()
    directory = _write_run(cell, root, model, device)
    chosen = devices.select(DeviceChoice(type=device["type"], index=device["index"]))
    chosen.give_back()
    observer = _Observer(chosen)
    carry_out(directory, shelf=shelf, switch=observer.switch, notify=observer)
    result = Result(cell=cell.name, facts=asdict(cell), loaded=observer.loaded, after_steps=observer.after_steps)
    for payload in _read(directory):
        _fold(result, payload)
    if device["type"] == "cuda":
        result.reserved = torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        result.context = total - free - torch.cuda.memory_reserved()
    if result.measured:
        result.error = result.predicted / result.measured - 1
    result.seconds = time.monotonic() - start
    gc.collect()
    return result


def _fold(result: Result, payload: event_pb2.EventPayload) -> None:
    kind = payload.WhichOneof("kind")
    if kind == "plan":
        memory = payload.plan.memory
        result.plan = {item.name: getattr(memory, item.name) for item in memory.DESCRIPTOR.fields}
        result.predicted = memory.peak_bytes
    elif kind == "step":
        result.measured = max(result.measured, payload.step.peak_memory_bytes)
        result.outcome = "measured" if result.outcome != "ran_out" else "ran_out"
    elif kind == "micro_batch_reduced":
        result.outcome = "ran_out"
    elif kind == "run_state" and payload.run_state.HasField("failure"):
        failure = payload.run_state.failure
        result.reason = errors_pb2.ErrorReason.Name(failure.reason).removeprefix("ERROR_REASON_")
        result.outcome = {"DOES_NOT_FIT": "refused", "DEVICE_OUT_OF_MEMORY": "ran_out"}.get(result.reason, "failed")
        if result.outcome == "failed":
            result.reason += f": {failure.message}"


def _write_run(cell: Cell, root: Path, model: str, device: Mapping[str, Any]) -> Path:
    hyperparameters: dict[str, Any] = {
        "num_steps": 2 * _STEPS,
        "batch": {"examples": cell.examples},
        "max_length": cell.length,
        "gradient_checkpointing": cell.checkpointing,
        "trainer": cell.trainer,
        "optimizer": {"name": cell.optimizer, "learning_rate": 1e-5},
        "save_every_steps": 0,
        "quantization": {
            name: value
            for name, value in (("method", cell.quantization), ("compute_dtype", cell.compute_dtype))
            if value
        },
    }
    if cell.training_type != "full":
        hyperparameters["lora"] = {"rank": cell.rank}
    spec = {
        "base_model": model,
        "model_type": "llama",
        "training_type": cell.training_type,
        "traits": [{"trait_type": "any", "datasets": [{"dataset_id": 1, "percentage": 100}]}],
        "hyperparameters": hyperparameters,
        "datasets": [_write_rows(cell, root / "blobs")],
    }
    directory = root / "runs" / hashlib.sha256(cell.name.encode()).hexdigest()[:16] / "1"
    directory.mkdir(parents=True)
    request = {
        "installation_id": "benchmark",
        "job_id": directory.parent.name,
        "attempt": 1,
        "spec_digest": "0" * 64,
        "spec": spec,
        # Not pinned: the files are ours.
        "weights_digest": "",
        "model_directory": str(root / "models" / model),
        "blobs_directory": str(root / "blobs"),
        "cache_directory": str(root / "cache"),
        "device": dict(device),
        "resume": None,
    }
    (directory / "run.json").write_text(json.dumps(request), encoding="utf-8")
    return directory


def _write_rows(cell: Cell, blobs: Path) -> dict[str, Any]:
    """More text than the length, a byte a token; the planner cuts it."""
    num_prompt = round(cell.length * (1 - cell.targets))
    texts = [chr(97 + number % 26) * 7 + " " for number in range(2 * cell.examples)]
    rows = []
    for text in texts:
        whole = text * (cell.length // len(text) + 1)
        completion = whole[: cell.length - num_prompt]
        rows.append({"prompt": whole[:num_prompt], "completion": completion} if num_prompt else {"text": whole})
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    path = blobs / sha256[:2] / sha256
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return {
        "dataset_id": 1,
        "sha256": sha256,
        "size_bytes": str(len(content)),
        "format": "prompt-completion" if num_prompt else "text",
        "num_examples": str(len(rows)),
    }


def _read(directory: Path) -> Iterator[event_pb2.EventPayload]:
    sequence = 0
    with Reader(directory / "journal") as reader:
        while records := reader.read(sequence, limit=4096):
            for record in records:
                yield event_pb2.EventPayload.FromString(record.decode().payload)
                sequence = record.run_sequence


def _describe(result: Result) -> str:
    gib = 1024**3
    line = f"{result.cell:44} {result.outcome:9}"
    if result.measured:
        line += f" predicted {result.predicted / gib:7.2f} measured {result.measured / gib:7.2f} {result.error:+7.1%}"
        line += f" reserved {result.reserved / gib:6.2f} loaded {result.loaded / gib:6.2f}"
    return f"{line} {result.reason} {result.seconds:.0f} s"


def _write(path: Path | None, name: str, results: list[Result]) -> None:
    if path is not None:
        document = {
            "device": name,
            "torch": torch.__version__,
            "c_library": " ".join(platform.libc_ver()),
            "cells": [asdict(result) for result in results],
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _measure_apart(cell: Cell, root: Path, model: str, device: Mapping[str, Any]) -> Result:
    """`measure` in a process that has measured nothing before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_measure_alone, cell, root, model, device).result()


def _measure_alone(cell: Cell, root: Path, model: str, device: Mapping[str, Any]) -> Result:
    return measure(cell, root, model, device, BaseShelf())


def main() -> int:
    """Status 1 when a prediction is off by more than it may be, a plan that fits ran out, or a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="sizes, joined by commas; all of the device's when not given")
    parser.add_argument("--output", type=Path, help="where to write the JSON, after every cell")
    parser.add_argument("--limit-seconds", type=float, default=450.0, help="start no cell after this time")
    options = parser.parse_args()
    is_cpu = options.device == "cpu"
    known = [cell for cell in (CPU_CELLS if is_cpu else CELLS) if cell.optimizer in optimizers.REGISTRY]
    sizes = options.only.split(",") if options.only else list(dict.fromkeys(cell.size for cell in known))
    device = {"type": options.device, "index": -1 if is_cpu else 0}
    name = "cpu" if is_cpu else torch.cuda.get_device_name()
    # One line for each 8-bit layer of each pass is no news; engines say so too.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    start = time.monotonic()
    results: list[Result] = []
    shelf = BaseShelf()
    with tempfile.TemporaryDirectory(prefix="memory-grid-") as temporary:
        root = Path(temporary)
        for size in sizes:
            cells = [cell for cell in known if cell.size == size]
            if time.monotonic() - start > options.limit_seconds:
                print(f"{size}: no time is left for its {len(cells)} cells", flush=True)
                continue
            model = random_models.place(root / "models", size)
            for cell in cells:
                if time.monotonic() - start <= options.limit_seconds:
                    measured = (
                        _measure_apart(cell, root, model, device)
                        if is_cpu
                        else measure(cell, root, model, device, shelf)
                    )
                    results.append(measured)
                    print(_describe(measured), flush=True)
                    _write(options.output, name, results)
            random_models.remove(root / "models", model)
    within = _WITHIN[options.device]
    bad = [result for result in results if result.outcome in ("failed", "ran_out") or abs(result.error) > within]
    errors = [abs(result.error) for result in results if result.outcome == "measured"]
    print(f"{len(results)} cells, {len(errors)} measured, {len(bad)} off, worst {max(errors, default=0):.1%}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
