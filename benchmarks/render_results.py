"""Writes the tables of docs/performance.md, and one of README.md, from the JSON files in benchmarks/results.

Text between a section's markers is replaced; everything else in the page is written by hand. A section without a
result is left out, heading and all, never filled with anything else. `--check` changes nothing and fails when page and
files disagree.

    python -m benchmarks.render_results [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.result_tables import beside, goals, rest, training
from benchmarks.result_tables.markdown import Result

ROOT = Path(__file__).parents[1]
PAGE, READ_ME = ROOT / "docs" / "performance.md", ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
_MARKER = re.compile(r"(<!-- results: (?P<section>[a-z-]+) -->\n).*?(?P<end><!-- end -->\n)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, what is to be known of a table, the table, and what is said below it. None of it without results."""

    heading: str
    above: str
    table: Callable[[Mapping[str, Result]], list[str]]
    below: str = ""

    def render(self, results: Mapping[str, Result]) -> str:
        """The whole of it; empty where nothing was measured."""
        lines = self.table(results)
        if not lines:
            return ""
        parts = [self.heading, self.above, "\n".join(lines), self.below]
        return "\n" + "\n\n".join(part for part in parts if part) + "\n\n"


SECTIONS: dict[str, Section] = {
    "goals": Section(
        heading="## Reached and not reached",
        above="""\
Of one H100 and the 3B shape, in steps of 8,192 tokens (`8b`: the 8B shape and 16,384), from files `h100-*` alone.
Where several runs measured a row of training, the best one counts; of everything else the worst. Parity is what proves
that the right thing was trained or loaded; a figure with none does not count yet.""",
        table=goals.goal_table,
    ),
    "training": Section(
        heading="## Training beside the peers",
        above="""\
Lines with the same run share it: both sides were processes on the same device and took turns. Only real tokens are
counted, never padding. A rate is the median over the counted steps; the range is that of single steps, which with mixed
lengths are of different work.""",
        table=training.training_table,
        below="""\
Peak is what the side's process had allocated at most (`max_memory_allocated`) since training began; device is what the
whole device held more because of it, by NVML, with the CUDA context and what the allocator keeps.""",
    ),
    "ratios": Section(
        heading="### Ours over a peer, and whether both trained the same",
        above="",
        table=training.ratio_table,
        below="""\
The first loss is that of our plan's first step, computed by each side on its own model before anything was trained.
Where rows are of one length, nobody repacks them and step n is the same batch on both sides, so the losses of the steps
are compared as well; the two adapters begin at different random weights.""",
    ),
    "gradients": Section(
        heading="### Gradients",
        above="""\
Of a batch of 2,048 tokens, against float32 throughout over the same base (`benchmarks/gpu_training.py`); the loss is
that of the row's first batch against the plain path's.""",
        table=training.gradient_table,
    ),
    "profile": Section(
        heading="## Where a step goes",
        above="""\
Milliseconds of kernels a step, by kind, from torch's profiler over three steps that are not counted; a kind that a run
has none of, or does not tell from others, is empty. The last line is what the same run took for the frozen matrix
products alone, forward and input gradient, repeated until the card is at its power limit. Within a step, kernels that
wait for memory leave power to the products, which may then take less.""",
        table=training.profile_table,
    ),
    "parts": Section(
        heading="### Its pieces alone",
        above="""\
By `python -m benchmarks.step_parts`, in milliseconds: `profile` is a whole step by family of kernels, `gemm` the frozen
products forward and backward.""",
        table=rest.parts_table,
    ),
    "tried": Section(
        heading="## What was tried",
        above="""\
Whole steps with one thing made another way, by `python -m benchmarks.step_parts`. What is slower than as trained did
not help; differences below one percent are within what two runs differ by.""",
        table=rest.tried_table,
    ),
    "full": Section(
        heading="## Training every weight",
        above="By `python -m benchmarks.gpu_full_training`: 8,192 tokens a step, dense, bfloat16 computing.",
        table=rest.full_table,
    ),
    "recorded": Section(
        heading="## Small passes",
        above="By `python -m benchmarks.gpu_training`, the same steps with and without recordings in one process.",
        table=rest.recorded_table,
    ),
    "curve": Section(
        heading="## Training in 8 bits on a real model",
        above="By `python -m benchmarks.fp8_curve`: the same steps in the same order over the same NF4 values.",
        table=rest.curve_table,
    ),
    "loading": Section(
        heading="## Loading",
        above="From files to a model on the device, in seconds (`make bench-gpu ROW=load`).",
        table=rest.loading_table,
    ),
    "starting": Section(
        heading="## Starting",
        above="""\
From StartTraining to the first optimizer step's event at the client, in seconds (`make bench-gpu ROW=start`); `peer` is
a process of plain transformers, PEFT and bitsandbytes from its start to its first step.""",
        table=rest.starting_table,
    ),
    "control-plane": Section(
        heading="## The control plane, without a GPU",
        above="Every figure of `python -m benchmarks.control_plane`, which says what its rows are (`make bench`).",
        table=rest.control_plane_table,
    ),
    "host": Section(
        heading="## Packing and making steps, without a GPU",
        above="The same tokenized rows in one process, in turned-about order (`make bench`).",
        table=rest.host_table,
    ),
    "runs": Section(heading="## The runs behind this page", above="", table=training.run_table),
}


# Of README.
SUMMARIES: dict[str, Section] = {
    "beside": Section(
        heading="## How fast",
        above="""\
On one H100 with a model of 3B's shape, LoRA of rank 16 on all linear layers, 8,192 tokens a step: dense rows are 2,048
tokens each, mixed ones as long as instructions are. In each line both sides were measured in one run on one device, in
turns where they train. How, against which goals, and what stands in the way of more is in
[performance](docs/performance.md), with the figures of the control plane.""",
        table=beside.beside_table,
    ),
}


def read_results(directory: Path) -> dict[str, Result]:
    """Every result by its file's name without what follows the dot, in the names' order.

    A `.jsonl` is what a script printed, a part a line: `{"parts": [...]}`.
    """
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in directory.glob("*.json")}
    for path in directory.glob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines()
        results[path.stem] = {"parts": [json.loads(line) for line in lines if line.startswith("{")]}
    return dict(sorted(results.items()))


def render(page: str, results: Mapping[str, Result]) -> str:
    """The page with its sections as the results have them. Raises KeyError for a marker of no known section."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{(SECTIONS | SUMMARIES)[match['section']].render(results)}{match['end']}"

    return _MARKER.sub(fill, page)


def main() -> int:
    """Status 1 when `--check` finds a page behind the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    results, are_behind = read_results(RESULTS), False
    for page in (PAGE, READ_ME):
        before = page.read_text(encoding="utf-8")
        after = render(before, results)
        if not arguments.check:
            page.write_text(after, encoding="utf-8")
        elif before != after:
            are_behind = True
            name = page.relative_to(ROOT)
            print(f"{name} is not what benchmarks/results says; run python -m benchmarks.render_results")
    return int(are_behind)


if __name__ == "__main__":
    sys.exit(main())
