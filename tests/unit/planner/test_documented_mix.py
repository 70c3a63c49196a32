"""What docs/training.md works out about shares, held-out data and steps comes out."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gpu_service.domain.counts import count_held_out, count_run
from gpu_service.domain.errors import Refusal
from gpu_service.domain.mix import allocate, compute_sources
from gpu_service.domain.packing import pack
from gpu_service.domain.planned_steps import CountedSteps
from gpu_service.domain.spec import Batch, DatasetReference, Hyperparameters, Trait, TraitDataset
from tests.fakes.datasets import make_spec
from tests.fakes.plans import PlanningRoom, by_dataset

DOCUMENT = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
MIX_TABLE = re.search(r"<!-- mix: ([\d/]+) of ([\d/]+) -->\n(.*?)\n\n", DOCUMENT, re.DOTALL)
STEPS = re.findall(r"<!-- steps: tokens (\d+), seed (\d+) -->\n```text\n(.*)\n(.*)\n```", DOCUMENT)


def mix_rows() -> list[tuple[str, str]]:
    assert MIX_TABLE is not None
    return re.findall(r"^\| `\{(.*)\}` \| (.*) \|$", MIX_TABLE[3], re.MULTILINE)


@pytest.mark.parametrize(("mix", "said"), mix_rows())
def test_the_table_of_mixes(mix: str, said: str) -> None:
    assert MIX_TABLE is not None
    percentages, sizes = ([int(part) for part in MIX_TABLE[number].split("/")] for number in (1, 2))
    datasets = tuple(TraitDataset(dataset_id=at, percentage=part) for at, part in enumerate(percentages, 1))
    given = dict(part.split(": ") for part in mix.split(", "))
    settings: dict[str, Any] = {
        "total": int(given["total"]),
        "policy": given.get("policy", "shrink"),
        "max_repeats": int(given.get("max_repeats", 1)),
    }
    sources = compute_sources([Trait(trait_type="a", datasets=datasets)])
    try:
        found = " / ".join(map(str, allocate(sources, sizes, **settings)))
    except Refusal as refusal:
        found = f"refused: dataset {refusal.details['dataset_id']}"
    assert found == said


def test_the_mixes_of_tokens_and_of_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = PlanningRoom(tmp_path, monkeypatch)

    def rows(count: int, num_tokens: int) -> list[dict[str, str]]:
        # Each digit is a token; the end of the text is one more.
        return [{"text": "0" + " 1" * (num_tokens - 2)}] * count

    references = [room.write(1, rows(30, 100), "text"), room.write(2, rows(1000, 40), "text")]
    for unit, said in (("tokens", "30 and 25 examples: 3000 + 1000 tokens"), ("examples", "30 and 10: 3000 + 400")):
        planned = by_dataset(room.plan(make_spec(references, percentages={1: 75, 2: 25}, mix={"unit": unit})))
        counts = " and ".join(row["num_examples"] for row in planned.values())
        tokens = " + ".join(row["num_tokens"] for row in planned.values())
        assert f"{counts}{' examples' if unit == 'tokens' else ''}: {tokens}" in said
        assert said in DOCUMENT


def test_the_fraction_of_the_example() -> None:
    datasets = tuple(TraitDataset(dataset_id=number, percentage=50) for number in (1, 2))
    sizes = {1: 50, 2: 3}
    references = [
        DatasetReference(dataset_id=number, sha256=str(number), num_examples=sizes[number]) for number in sizes
    ]
    held_out = count_held_out([Trait(trait_type="a", datasets=datasets, held_out_fraction=0.1)], references, sizes)
    first, second = (held_out.reserved[number] for number in sizes)
    said = f"holds out {first} of 50 examples and {second} of 3, and leaves {50 - first} and {3 - second} to train on"
    assert said in DOCUMENT


def test_the_steps_of_examples() -> None:
    for given, said in (
        (Hyperparameters(batch=Batch(examples=4), num_epochs=1.5), "4 + 4 + 4 + 3 examples"),
        (Hyperparameters(batch=Batch(examples=4), num_steps=3), "they have 4 + 4 + 4."),
    ):
        _, num_steps, total = count_run(given, 10)
        steps = CountedSteps(examples_per_epoch=10, batch_examples=4, total_examples=total, seed=0)
        assert steps.num_steps == num_steps
        counts = " + ".join(str(len(steps.places(step))) for step in range(num_steps))
        assert counts in said
        assert said in DOCUMENT


@pytest.mark.parametrize(("tokens", "seed", "lengths", "said"), STEPS)
def test_the_steps_of_tokens(tokens: str, seed: str, lengths: str, said: str) -> None:
    numbers = json.loads(f"[{lengths.replace(' ', ',')}]")
    run = pack(
        numbers,
        tokens_per_step=int(tokens),
        seed=int(seed),
        total_examples=len(numbers),
        num_steps=None,
        most_examples=1000,
    )
    steps = [run.places[start:end] for start, end in itertools.pairwise(run.offsets)]
    assert " | ".join(" ".join(str(numbers[place]) for place in step) for step in steps) == said


def test_every_worked_example_was_found() -> None:
    assert len(mix_rows()) == 5
    assert len(STEPS) == DOCUMENT.count("<!-- steps: ") == 1
