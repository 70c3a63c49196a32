"""How near a training in 8 bits stays to one in bfloat16: the same steps on the same real model, loss by loss.

Both train the same adapter over the same NF4 values, on this repository's own files, cut into rows of one length, in
one order. Says how far losses are apart on the way and at the end: the mean of the last steps, and of rows neither saw.

    python -m benchmarks.fp8_curve --model models/HuggingFaceTB/SmolLM2-135M-Instruct --out curve.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from array import array
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_training import Stepper, make_settings
from gpu_service.domain.planned_data import Example, ExampleReference
from gpu_service.engine.builders.methods import lora, qlora
from gpu_service.engine.builders.quantization import nf4
from gpu_service.engine.failures import library_versions
from gpu_service.engine.fast_path.flat_adamw import FlatAdamW
from gpu_service.engine.fast_path.model import FastModel, FastSettings
from gpu_service.engine.training.accelerator import make_accelerator
from gpu_service.engine.training.batches import MicroBatch, collate
from gpu_service.engine.training.modes import measuring
from gpu_service.engine.training.objectives.sft import Likelihood

_ROW_TOKENS, _ROWS_PER_STEP = 512, 8
_HELD_OUT_ROWS = 32
_LAST_STEPS = 20


class _Rows:
    """Stands in for planned data: rows in memory."""

    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = rows

    def example(self, reference: ExampleReference) -> Example:
        tokens = self._rows[reference.example_index]
        return Example(tokens=memoryview(array("i", tokens)), mask=memoryview(bytes([0, *[1] * (len(tokens) - 1)])))


def read_rows(model: Path, text: Path) -> list[list[int]]:
    """All Markdown and Python below `text`, as rows of tokens in an order that is always the same."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    files = sorted([*text.rglob("*.md"), *text.rglob("*.py")])
    tokens = [token for file in files for token in tokenizer(file.read_text(encoding="utf-8"))["input_ids"]]
    rows = [tokens[first : first + _ROW_TOKENS] for first in range(0, len(tokens) - _ROW_TOKENS, _ROW_TOKENS)]
    random.Random(0).shuffle(rows)
    return rows


def make_batches(rows: list[list[int]], steps: int) -> tuple[list[MicroBatch], MicroBatch]:
    """Batches of every step, around again when rows run out, and the one that is held out."""
    data: Any = _Rows(rows)

    def batch(numbers: list[int]) -> MicroBatch:
        return collate(data, [ExampleReference(0, number) for number in numbers])

    seen = len(rows) - _HELD_OUT_ROWS
    order = [number % seen for number in range(steps * _ROWS_PER_STEP)]
    taken = [batch(order[first : first + _ROWS_PER_STEP]) for first in range(0, len(order), _ROWS_PER_STEP)]
    return taken, batch(list(range(seen, len(rows))))


def train(model_directory: Path, batches: list[MicroBatch], held_out: MicroBatch, *, in_fp8: bool) -> dict[str, Any]:
    """Losses of all steps, and of what was held out before and after."""
    from transformers import AutoModelForCausalLM

    device, settings = torch.device("cuda", 0), make_settings(argparse.Namespace(recompute=False))
    accelerator = make_accelerator(device, torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        model_directory,
        dtype=torch.bfloat16,
        device_map={"": "cuda:0"},
        quantization_config=nf4.build_config(double_quantization=True, compute_dtype=torch.bfloat16),
    )
    qlora.prepare_base(base)
    torch.manual_seed(0)
    attached = lora.attach(base, str(model_directory), settings)
    fast = FastModel(
        attached,
        FastSettings(device=device, compute_dtype=torch.bfloat16, keeps_weights=True, recomputes=False, in_fp8=in_fp8),
    )
    optimizer = accelerator.prepare(FlatAdamW(fast.flat_adapter, settings.optimizer))
    stepper = Stepper(accelerator=accelerator, model=fast, optimizer=optimizer, settings=settings)
    objective = Likelihood()

    def measure() -> float:
        with measuring(fast):
            total = float(objective.forward(fast, held_out.to(device)).total)
        return total / held_out.num_target_tokens

    before = measure()
    losses = [loss for loss, _ in stepper.run(batches)]
    return {"losses": losses, "held_out_before": before, "held_out_after": measure()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    batches, held_out = make_batches(read_rows(arguments.model, arguments.text), arguments.steps)
    sides = {name: train(arguments.model, batches, held_out, in_fp8=name == "fp8") for name in ("bfloat16", "fp8")}
    exact, rounded = sides["bfloat16"], sides["fp8"]
    ends = [statistics.mean(side["losses"][-_LAST_STEPS:]) for side in (exact, rounded)]
    summary = {
        "device": torch.cuda.get_device_name(0),
        "model": arguments.model.name,
        "steps": arguments.steps,
        "mean_difference": statistics.mean(
            abs(one - other) for one, other in zip(exact["losses"], rounded["losses"], strict=True)
        ),
        "last_steps": ends,
        "last_steps_relative_difference": abs(ends[1] - ends[0]) / ends[0],
        "held_out_before": [exact["held_out_before"], rounded["held_out_before"]],
        "held_out_after": [exact["held_out_after"], rounded["held_out_after"]],
    }
    print(json.dumps(summary), flush=True)
    if arguments.out:
        document = {**summary, "versions": dict(library_versions()), "sides": sides}
        arguments.out.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
