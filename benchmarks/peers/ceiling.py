"""What the device makes of a row's frozen matrix products alone: the ceiling that a step is held against.

The same shapes as a step of the row, forward and input gradient, with q, k, v and gate, up put together and the head
in pieces of 2,048 rows, over and over for some seconds, so that the card is as hot as in training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.rows import ROWS
from benchmarks.random_models import SHAPES, Shape

_HEAD_ROWS = 2048
_LEAST_PASSES = 3
# torch's own annotations of it are incomplete.
_CUDA: Any = torch.cuda


def products(shape: Shape, tokens: int) -> list[tuple[int, int, int, int]]:
    """(rows, inputs, outputs, how often a step) of each frozen product's forward pass."""
    key_value = 2 * shape.key_value_heads * shape.head_dim
    layer = [
        (shape.hidden, shape.heads * shape.head_dim + key_value),
        (shape.heads * shape.head_dim, shape.hidden),
        (shape.hidden, 2 * shape.intermediate),
        (shape.intermediate, shape.hidden),
    ]
    rows = min(_HEAD_ROWS, tokens)
    return [(tokens, inputs, outputs, shape.layers) for inputs, outputs in layer] + [
        (rows, shape.hidden, shape.vocabulary, tokens // rows)
    ]


def step_flops(shape: Shape, tokens: int) -> int:
    """Of one step: each product forward and for its input's gradient."""
    return sum(2 * 2 * rows * inputs * outputs * times for rows, inputs, outputs, times in products(shape, tokens))


def measure(shape: Shape, tokens: int, seconds: float) -> dict[str, float]:
    """Sustained rate over at least `seconds`: milliseconds a step and TFLOP/s."""
    work = []
    for rows, inputs, outputs, times in products(shape, tokens):
        weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) * 0.02
        row = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
        gradient = torch.randn(rows, outputs, device="cuda", dtype=torch.bfloat16)
        work.append((row, gradient, weight, times))

    def step() -> None:
        for row, gradient, weight, times in work:
            for _ in range(times):
                row @ weight.T
                gradient @ weight

    step()
    torch.cuda.synchronize()
    marks = [_CUDA.Event(enable_timing=True)]
    marks[0].record()
    began = time.monotonic()
    while len(marks) <= _LEAST_PASSES or time.monotonic() - began < seconds:
        step()
        marks.append(_CUDA.Event(enable_timing=True))
        marks[-1].record()
        marks[-1].synchronize()
    # The first half heats the card.
    half = len(marks) // 2
    milliseconds = marks[half].elapsed_time(marks[-1]) / (len(marks) - 1 - half)
    return {
        "step_milliseconds": round(milliseconds, 2),
        "teraflops_per_second": round(step_flops(shape, tokens) / milliseconds / 1e9, 1),
        "tokens_per_second": round(tokens / milliseconds * 1e3),
    }


def main() -> None:
    """Writes the ceiling of one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=tuple(ROWS), required=True)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    row = ROWS[arguments.row]
    found = measure(SHAPES[row.shape], row.tokens_per_step, arguments.seconds)
    arguments.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
