"""Datasets and planner runs for benchmarks of the host's side: rows written as blobs, the planner as its process."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes.tiny_models import place_header_only

ROOT = Path(__file__).parents[1]
_WORDS = ("quick", "brown", "fox", "lazy", "dog", "two", "plus", "four", "answer", "yes", "one", "number", "the", "of")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of the planner's process. `peak_bytes` is its largest resident memory."""

    directory: Path
    plan: Mapping[str, Any]
    seconds: float
    peak_bytes: int


class PlanningSite:
    """A directory with a tiny base (random, without weights), blobs, and caches."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = place_header_only(root / "models")
        config_path = root / "models" / self.model / "config.json"
        config = json.loads(config_path.read_text())
        config_path.write_text(json.dumps({**config, "max_position_embeddings": 131_072}))

    def write(self, dataset_id: int, rows: Iterable[Mapping[str, str]]) -> dict[str, Any]:
        """Streams rows into a blob; gives the reference."""
        staged, digest, count = self.root / "staged", hashlib.sha256(), 0
        with staged.open("wb") as file:
            for row in rows:
                line = json.dumps(row).encode() + b"\n"
                digest.update(line)
                file.write(line)
                count += 1
        sha256 = digest.hexdigest()
        target = self.root / "blobs" / sha256[:2] / sha256
        target.parent.mkdir(parents=True, exist_ok=True)
        size = staged.stat().st_size
        staged.rename(target)
        return {
            "dataset_id": dataset_id,
            "sha256": sha256,
            "size_bytes": str(size),
            "format": "prompt-completion",
            "num_examples": str(count),
        }

    def plan(self, spec: Mapping[str, Any], *, cache: str) -> Planned:
        """Runs the planner on an empty or used cache. Raises `RuntimeError` with what it refused."""
        request = {
            "spec": spec,
            "model_directory": str(self.root / "models" / self.model),
            "blobs_directory": str(self.root / "blobs"),
            "cache_directory": str(self.root / cache),
            "device": {"type": "cpu", "name": "cpu", "total_memory_bytes": 0, "free_memory_bytes": 0},
        }
        path = self.root / "request.json"
        path.write_text(json.dumps(request))
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'clients/python'}"}
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu_service.planner", str(path)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert process.stdout is not None
        answer = json.loads(process.stdout.read().splitlines()[-1])
        _, _, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        if answer["type"] != "planned":
            raise RuntimeError(answer["failure"]["message"])
        directory = Path(answer["plan_directory"])
        plan = json.loads((directory / "plan.json").read_text())
        return Planned(directory=directory, plan=plan, seconds=seconds, peak_bytes=usage.ru_maxrss * 1024)

    def spec(self, references: list[dict[str, Any]], shares: Mapping[int, float], **fields: Any) -> dict[str, Any]:
        """A spec of one trait over these datasets."""
        datasets = [{"dataset_id": dataset_id, "percentage": share} for dataset_id, share in shares.items()]
        return {
            "base_model": self.model,
            "model_type": "llama",
            "training_type": "qlora",
            "traits": [{"trait_type": "bench", "datasets": datasets}],
            "datasets": references,
            **fields,
        }


def short_rows(count: int, *, seed: int) -> Iterator[dict[str, str]]:
    """Rows of some 10 to 40 tokens."""
    source = random.Random(seed)
    for number in range(count):
        words = " ".join(source.choices(_WORDS, k=source.randrange(2, 10)))
        yield {"prompt": f"What is {number} of {seed}?", "completion": words}


def log_normal_rows(count: int, *, seed: int) -> Iterator[dict[str, str]]:
    """Rows whose tokens are about log-normal with a mean of some 350."""
    source = random.Random(seed)
    for number in range(count):
        words = max(2, int(source.lognormvariate(4.95, 0.8)))
        yield {"prompt": f"What is {number}?", "completion": " ".join(source.choices(_WORDS, k=words))}
