"""The token stream of a row: written as a dataset, planned by our planner, and given to every side in the plan's order.

So all sides read the same tokenized examples, and where no side repacks them, step n is the same batch for all. The
text is random letters, a byte a token: speed does not depend on what it says.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import string
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.rows import DENSE_LENGTH, Row
from gpu_service.domain.planned_data import PlannedData
from tests.fakes.datasets import make_spec, write_blob

MEDIAN_LENGTH, SIGMA, SHORTEST = 350, 0.8, 32
# An epoch has at least this many steps more than are made: the last one of an epoch may be short.
_SPARE_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a row is set up: `run_directory` is for one of ours to carry out, `stream_path` for every peer to read."""

    root: Path
    model_directory: Path

    def run_directory(self, run: str) -> Path:
        return self.root / "runs" / run / "1"

    @property
    def stream_path(self) -> Path:
        return self.root / "stream.json"


def draw_lengths(stream: str, num_tokens: int, seed: int = 0) -> list[int]:
    """Lengths of rows that come to `num_tokens` or a little more: all of 2,048, or log-normal."""
    draw, lengths = random.Random(seed), list[int]()
    while sum(lengths) < num_tokens:
        length = DENSE_LENGTH
        if stream == "mixed":
            length = min(max(round(draw.lognormvariate(math.log(MEDIAN_LENGTH), SIGMA)), SHORTEST), DENSE_LENGTH)
        lengths.append(length)
    return lengths


def draw_texts(lengths: list[int], seed: int = 0) -> Iterator[str]:
    """A text of random letters for each length."""
    draw = random.Random(seed)
    for length in lengths:
        yield "".join(draw.choices(string.ascii_letters, k=length))


def set_up(
    row: Row, site: Site, *, runs: Iterable[str], settings: Mapping[str, Any], device: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the dataset, `runs` of ours that train by `settings`, and the stream. What was planned, for the result.

    Raises RuntimeError when the planner refuses the row.
    """
    blobs = site.root / "blobs"
    num_steps = int(settings["num_steps"])
    lengths = draw_lengths(row.stream, (num_steps + _SPARE_STEPS) * row.tokens_per_step)
    texts = [{"text": text} for text in draw_texts(lengths)]
    spec = make_spec(
        [write_blob(blobs, 1, texts, "text")],
        base_model=f"random/{row.shape}",
        training_type=row.training_type,
        hyperparameters=settings,
    )
    places = {
        "model_directory": str(site.model_directory),
        "blobs_directory": str(blobs),
        "cache_directory": str(site.root / "cache"),
    }
    for run in runs:
        directory = site.run_directory(run)
        directory.mkdir(parents=True)
        request = {
            "installation_id": "benchmark",
            "job_id": run,
            "attempt": 1,
            "spec_digest": "0" * 64,
            "spec": spec,
            # Not pinned: the files are ours.
            "weights_digest": "",
            "device": {"type": device["type"], "index": 0 if device["type"] == "cuda" else -1},
            "resume": None,
            **places,
        }
        (directory / "run.json").write_text(json.dumps(request), encoding="utf-8")
    plan_directory = _plan(site.root, {"spec": spec, "device": dict(device), "weights_digest": "", **places})
    data = PlannedData.open(plan_directory)
    steps = [[_tokens(data, reference) for reference in data.step_examples(step)] for step in range(num_steps)]
    site.stream_path.write_text(json.dumps({"steps": steps}), encoding="utf-8")
    planned = [len(tokens) for step in steps for tokens in step]
    digest = hashlib.sha256(site.stream_path.read_bytes()).hexdigest()
    return {
        "stream": row.stream,
        "stream_sha256": digest,
        "sequences": len(planned),
        "mean_sequence_tokens": round(sum(planned) / len(planned), 1),
        "longest_sequence_tokens": max(planned),
    }


def read_steps(path: Path) -> list[list[list[int]]]:
    """The tokens of each sequence of each of our steps."""
    steps: list[list[list[int]]] = json.loads(path.read_text(encoding="utf-8"))["steps"]
    return steps


def _tokens(data: PlannedData, reference: Any) -> list[int]:
    return list(data.example(reference).tokens)


def _plan(root: Path, request: Mapping[str, Any]) -> Path:
    path = root / "planner-request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    made = subprocess.run(
        [sys.executable, "-m", "gpu_service.planner", str(path)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    answer = json.loads((made.stdout.splitlines() or ["{}"])[-1])
    if answer.get("type") != "planned":
        raise RuntimeError(f"the planner says {answer or made.stderr[-2000:]}")
    return Path(answer["plan_directory"])
