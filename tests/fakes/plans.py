"""Exact plans made in the test's own process, with what they tokenized counted. Starts nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpu_service.domain.device import Device
from gpu_service.domain.planned_data import PlannedData
from gpu_service.domain.spec import TrainingSpec
from gpu_service.planner.exact import PlanRequest, make_plan
from gpu_service.planner.tokenizer import TextTokenizer
from tests.fakes.datasets import write_blob
from tests.fakes.tiny_models import place_header_only


class PlanningRoom:
    """Blobs, a tiny base without weights, and a cache; `num_tokenized` counts rows since it was last set."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.model = place_header_only(root / "models")
        self.num_tokenized = 0
        encode = TextTokenizer.encode

        def count(tokenizer: TextTokenizer, rendered: Any, **settings: Any) -> Any:
            self.num_tokenized += len(rendered)
            return encode(tokenizer, rendered, **settings)

        monkeypatch.setattr(TextTokenizer, "encode", count)

    def write(
        self, dataset_id: int, rows: Iterable[Mapping[str, Any]] | bytes, format: str = "prompt-completion"
    ) -> Any:
        """A dataset; gives its reference."""
        return write_blob(self.root / "blobs", dataset_id, rows, format)

    def plan(self, spec: Mapping[str, Any], *, cache: str = "cache") -> PlannedData:
        """Raises `Refusal`."""
        request = PlanRequest(
            spec=TrainingSpec.from_json(json.loads(json.dumps(spec))),
            model_directory=self.root / "models" / self.model,
            blobs_directory=self.root / "blobs",
            cache_directory=self.root / cache,
            device=Device(),
            weights_digest="",
            spec_digest="",
        )
        return PlannedData.open(make_plan(request, stream=_Silent()))  # type: ignore[arg-type]


class _Silent:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None


def write_rows(count: int, *, seed: int = 0, words: int = 8) -> list[dict[str, str]]:
    """Rows of unlike lengths, all different: about `words` words of answer."""
    source = random.Random(seed)
    return [
        {
            "prompt": f"{seed} {number} {'what ' * source.randrange(1, words)}",
            "completion": " ".join(str(source.randrange(100)) for _ in range(source.randrange(1, 2 * words))),
        }
        for number in range(count)
    ]


def by_dataset(data: PlannedData) -> dict[int, Any]:
    """The plan's rows of what is trained on, by dataset id."""
    return {row["dataset_id"]: row for row in data.plan["datasets"] if not row["held_out"]}


def used_rows(data: PlannedData, *, held_out: bool = False) -> dict[tuple[str, int], list[int]]:
    """Rows of each trait's dataset in the first epoch, or of those held out, in their order."""
    references = data.held_out_examples()
    if not held_out:
        references = [item for step in range(data.num_steps) for item in data.step_examples(step)]
        references = references[: data.examples_per_epoch]
    rows: dict[tuple[str, int], list[int]] = {}
    for reference in references:
        source = data.sources[reference.source_index]
        rows.setdefault((source.trait_type, source.dataset_id), []).append(data.row(reference))
    return rows
