"""The host's side of a step: tokens per second of tokenizing, packing, and milliseconds to build a step, beside TRL's.

    pip install --no-deps --target /tmp/trl trl datasets accelerate dill xxhash multiprocess pandas
    PYTHONPATH=.:clients/python:/tmp/trl python -m benchmarks.host_side [--rows 20000] [--tokens 2048]

Both pack the same tokenized rows (log-normal, mean about 350) in this process, in alternating order, several times;
medians are printed. TRL's part is `trl.data_utils.pack_dataset` with strategy `bfd` and its own collator without
padding. Ours is `domain.packing.pack`, and `collate` of the steps that it made; the order of the epoch is part of it.
Where TRL is not installed its lines are left out, and the status is 2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.planning_rows import PlanningSite, log_normal_rows
from gpu_service.domain.packing import pack
from gpu_service.domain.planned_data import PlannedData
from gpu_service.engine.training.batches import collate

LEAST_FILL_RATIO, MOST_TIME_RATIO = 1.0, 0.5


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What one way of packing came to."""

    fill: float
    num_steps: int
    pack_seconds: float
    step_milliseconds: float


def main() -> int:
    """Status 1 when a ratio is not kept, 2 without TRL."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the medians")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        data = _plan(PlanningSite(Path(directory)), arguments.rows, arguments.tokens)
        ways: dict[str, Callable[[], Packed]] = {"tunesmith": lambda: _pack_ours(data, arguments.tokens)}
        peer = _find_peer(data, arguments.tokens)
        if peer is not None:
            ways["trl"] = peer
        results: dict[str, list[Packed]] = {name: [] for name in ways}
        for repeat in range(arguments.repeats + 1):
            for name in sorted(ways, reverse=bool(repeat % 2)):
                packed = ways[name]()
                if repeat:  # the first is to warm up
                    results[name].append(packed)
    medians = {name: _median(packed) for name, packed in results.items()}
    for name, packed in medians.items():
        print(
            f"{name:<10} fill {packed.fill:.2%}  steps {packed.num_steps}  pack {packed.pack_seconds * 1e3:.0f} ms"
            f"  build a step {packed.step_milliseconds:.3f} ms"
        )
    if arguments.json:
        document = {"rows": arguments.rows, "tokens": arguments.tokens}
        ways_found = {name: asdict(packed) for name, packed in medians.items()}
        arguments.json.write_text(json.dumps({**document, "ways": ways_found}, indent=1), encoding="utf-8")
    if "trl" not in medians:
        print("TRL is not installed; see --help")
        return 2
    ours, theirs = medians["tunesmith"], medians["trl"]
    ratios = {
        "fill": ours.fill / theirs.fill,
        "packing time": ours.pack_seconds / theirs.pack_seconds,
        "step time": ours.step_milliseconds / theirs.step_milliseconds,
        "packing and one epoch of steps": _total_seconds(ours) / _total_seconds(theirs),
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} of TRL's")
    kept = ratios.pop("fill") >= LEAST_FILL_RATIO and max(ratios.values()) <= MOST_TIME_RATIO
    print("fill at least equal and time at most half" if kept else "NOT: fill at least equal and time at most half")
    return 0 if kept else 1


def _plan(site: PlanningSite, rows: int, tokens: int) -> PlannedData:
    """The rows planned twice, to tell tokenizing from all else."""
    reference = site.write(1, log_normal_rows(rows, seed=0))
    batch = {"batch": {"tokens": str(tokens)}, "max_length": min(2048, tokens)}
    spec = site.spec([reference], {1: 100.0}, hyperparameters=batch)
    first, again = site.plan(spec, cache="cache"), site.plan(spec, cache="cache")
    num_tokens = int(first.plan["tokens_per_epoch"])
    longest = first.plan["longest_example_tokens"]
    print(
        f"{rows} rows, {num_tokens} tokens (mean {num_tokens / rows:.0f}, longest {longest})"
        f"\nplan {first.seconds:.1f} s, from kept tokens {again.seconds:.1f} s: tokenizing"
        f" {num_tokens / max(first.seconds - again.seconds, 1e-3):,.0f} tokens/s"
    )
    return PlannedData.open(first.directory)


def _pack_ours(data: PlannedData, tokens: int) -> Packed:
    references = [item for step in range(data.num_steps) for item in data.step_examples(step)]
    lengths = [len(data.example(item).tokens) for item in references]
    start = time.perf_counter()
    run = pack(
        lengths, tokens_per_step=tokens, seed=0, total_examples=len(lengths), num_steps=None, most_examples=10**8
    )
    pack_seconds = time.perf_counter() - start
    start = time.perf_counter()
    for begin, end in itertools.pairwise(run.offsets):
        collate(data, [references[place] for place in run.places[begin:end]])
    seconds = time.perf_counter() - start
    fill = sum(lengths) / (run.num_steps * tokens)
    return Packed(
        fill=fill,
        num_steps=run.num_steps,
        pack_seconds=pack_seconds,
        step_milliseconds=1e3 * seconds / run.num_steps,
    )


def _find_peer(data: PlannedData, tokens: int) -> Callable[[], Packed] | None:
    """TRL's way, on the same rows; None when it is not installed."""
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
        from trl.data_utils import pack_dataset  # type: ignore[import-not-found,unused-ignore]
        from trl.trainer.sft_trainer import (  # type: ignore[import-not-found,unused-ignore]
            DataCollatorForLanguageModeling,
        )
    except ImportError as error:
        print(f"no TRL: {error}")
        return None
    datasets.disable_caching()
    datasets.disable_progress_bars()
    examples = [data.example(item) for step in range(data.num_steps) for item in data.step_examples(step)]
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for example in examples:
        ids = example.tokens.tolist()
        rows["input_ids"].append(ids)
        rows["labels"].append([token if target else -100 for token, target in zip(ids, example.mask, strict=True)])
    dataset = datasets.Dataset.from_dict(rows)
    collator: Any = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    total = sum(map(len, rows["input_ids"]))

    def run() -> Packed:
        start = time.perf_counter()
        packed = pack_dataset(dataset, tokens, strategy="bfd")
        pack_seconds = time.perf_counter() - start
        start = time.perf_counter()
        for index in range(len(packed)):
            collator([packed[index]])
        seconds = time.perf_counter() - start
        return Packed(
            fill=total / (len(packed) * tokens),
            num_steps=len(packed),
            pack_seconds=pack_seconds,
            step_milliseconds=1e3 * seconds / len(packed),
        )

    return run


def _median(packed: list[Packed]) -> Packed:
    fields = ("fill", "num_steps", "pack_seconds", "step_milliseconds")
    return Packed(**{name: statistics.median(getattr(item, name) for item in packed) for name in fields})


def _total_seconds(packed: Packed) -> float:
    return packed.pack_seconds + packed.num_steps * packed.step_milliseconds / 1e3


if __name__ == "__main__":
    sys.exit(main())
