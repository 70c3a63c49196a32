"""What saving memory costs in time: steps of a 3B shape on one GPU under each way that a plan may choose.

One base of random weights; every way trains the same steps, in turn, twice in alternation, so that a warming card
favors none. Prints tokens a second, the step and the peak of each, and writes JSON. About 110 seconds.

    python -m benchmarks.recomputation_cost --output recomputation-cost.json
    python -m benchmarks.recomputation_cost --ways nothing "whole, offloaded"
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

# Before torch is imported; as the node's engines have it.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from google.protobuf import json_format

from benchmarks import random_models
from benchmarks.fast_memory_grid import MIXED, Cell, draw, references, resolve
from gpu_service.domain.recomputation import NOTHING, Recomputation, everything
from gpu_service.engine import devices
from gpu_service.engine.builders.methods import lora
from gpu_service.engine.request import DeviceChoice
from gpu_service.engine.trainers import make_trainer
from gpu_service.engine.training.batches import MicroBatchLimit, collate, split
from gpu_service.engine.training.flat_attention import attending_within_sequences
from gpu_service.engine.training.objectives import make_objective
from tunesmith.common.v1 import training_spec_pb2

_STEPS, _WARM_UP, _ROUNDS = 8, 2, 2
_LAYERS = random_models.SHAPES["3B"].layers
WAYS: dict[str, dict[str, Any]] = {
    "weights kept restored": {"base": "nf4-kept"},
    "nothing": {},
    "elementwise": {"recomputation": Recomputation(elementwise_layers=_LAYERS)},
    "feed-forward": {"recomputation": Recomputation(feed_forward_layers=_LAYERS)},
    "whole": {"recomputation": "all"},
    "whole, offloaded": {"recomputation": "offload"},
    **{
        f"whole, offloaded, in {slices} slices": {
            "recomputation": everything(_LAYERS, offload=True, feed_forward_slices=slices)
        }
        for slices in (2, 3, 4)
    },
    "whole, offloaded, passes of 4,200": {"recomputation": "offload", "micro_batch_tokens": 4200},
    "whole, offloaded, passes of 2,100": {"recomputation": "offload", "micro_batch_tokens": 2100},
    "dropout of 0.1": {"dropout": 0.1},
}


def measure(way: str, lengths: tuple[int, ...], base: Any, device: devices.Device) -> tuple[list[float], int]:
    """Seconds of each counted step, and the peak in bytes."""
    cell = Cell(size="3B", lengths=lengths, **{"recomputation": NOTHING, **WAYS[way]})
    settings = training_spec_pb2.Hyperparameters()
    json_format.ParseDict(resolve(cell, device).to_json(), settings)
    model = lora.attach(base, "random", settings)
    trainer = make_trainer(model, settings, device.torch_device)
    try:
        objective, data = make_objective(settings), draw(cell.lengths, cell)
        limit = MicroBatchLimit.of(settings.batch, trainer.saved.config)
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        trainer.model.train()
        device.give_back()
        device.start_counting()
        seconds = []
        with attending_within_sequences(trainer.model):
            for _ in range(_WARM_UP + _STEPS):
                began = time.perf_counter()
                for part in split(data, references(data), limit):
                    outcome = objective.forward(trainer.model, collate(data, part).to(device.torch_device))
                    trainer.accelerator.backward(outcome.total / 8000)
                trainer.accelerator.clip_grad_norm_(trained, 1.0)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad(set_to_none=True)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
        return seconds[_WARM_UP:], device.peak_bytes()
    finally:
        trainer.release()
        lora.detach(model)


def main() -> None:
    """Measure every way; one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS), metavar="WAY")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--lengths", choices=("mixed", "dense"), default="mixed")
    options = parser.parse_args()
    lengths = MIXED if options.lengths == "mixed" else (2048,) * 4
    device = devices.select(DeviceChoice(type="cuda", index=0))
    base = random_models.build("3B", device.torch_device, in_nf4=True)
    seconds: dict[str, list[float]] = {way: [] for way in options.ways}
    peaks: dict[str, int] = {}
    for number in range(options.rounds):
        for way in options.ways if number % 2 == 0 else reversed(options.ways):
            measured, peaks[way] = measure(way, lengths, base, device)
            seconds[way] += measured
    tokens = sum(lengths)
    rows = []
    for way, times in seconds.items():
        median = statistics.median(times)
        row = {
            "way": way,
            "tokens_per_second": round(tokens / median),
            "step_milliseconds": round(1000 * median, 1),
            "step_milliseconds_range": [round(1000 * min(times), 1), round(1000 * max(times), 1)],
            "peak_gib": round(peaks[way] / 2**30, 2),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.output:
        document = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "tokens": tokens, "rows": rows}
        options.output.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
