"""The worked examples of docs/training.md about passes, losses, warnings and pairs come out as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gpu_service.domain.planned_data import Source
from gpu_service.engine.training.batches import MicroBatchLimit, collate, split
from gpu_service.engine.training.losses import LossTally
from gpu_service.engine.training.objectives.dpo import Preference
from gpu_service.engine.training.rises import find_rises
from tests.fakes.planned_rows import PlannedRows, make_example, make_examples

_TEXT = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")


def _find(pattern: str) -> tuple[str, ...]:
    found = re.search(pattern, _TEXT, re.DOTALL)
    assert found is not None, pattern
    return found.groups()


def _table(rows: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows.strip().splitlines()[2:]]


def test_passes() -> None:
    tokens, examples, given, expected = _find(
        r"<!-- passes: tokens (\d+), examples (\d+) -->\n```text\n(.*?)\n(.*?)\n```"
    )
    assert f"`micro_batch_tokens: {tokens}` and `micro_batch_examples: {examples}`" in _TEXT
    lengths = [int(length) for length in given.split()]
    rows = PlannedRows(make_examples(lengths, vocabulary_size=9, seed=0))
    limit = MicroBatchLimit(tokens=int(tokens), examples=int(examples))
    parts = [
        " ".join(str(lengths[reference.example_index]) for reference in part)
        for part in split(rows.as_data(), rows.references, limit)
    ]
    assert " | ".join(parts) == expected


def test_losses_add_up() -> None:
    (rows,) = _find(r"<!-- losses: .*? -->\n(.*?)<!-- end -->")
    table = [(trait, dataset, float(loss), int(count)) for trait, dataset, loss, count in _table(rows)]
    given = [row for row in table if row[1] != "all"]
    data = PlannedRows([make_example(range(count + 1)) for _, _, _, count in given])
    sources = [
        Source(trait_type=trait, dataset_id=int(dataset), held_out=False, num_examples=1)
        for trait, dataset, _, _ in given
    ]
    batch = collate(data.as_data(), [ref._replace(source_index=place) for place, ref in enumerate(data.references)])
    tally = LossTally()
    tally.add(batch, batch.targets_by_example, [[loss * count] for _, _, loss, count in given], sources)

    told = [
        (value.trait_type, str(value.dataset_id), value.loss, value.num_target_tokens) for value in tally.by_dataset()
    ]
    told += [(value.trait_type, "all", value.loss, value.num_target_tokens) for value in tally.by_trait()]
    told.append(("all", "all", tally.mean, tally.num_target_tokens))
    assert told == table


def test_rises() -> None:
    after, lines = _find(r"<!-- rises: (\d+) -->\n```text\n(.*?)\n```")
    assert f"`warn_after_rises: {after}`" in _TEXT
    for line in lines.splitlines():
        losses, said = line.split(": ")
        history: list[dict[str, object]] = []
        warned = []
        for number, loss in enumerate(losses.split(), start=1):
            history.append({"losses": [{"trait_type": "coding", "dataset_id": 0, "loss": float(loss)}]})
            if find_rises(history, int(after)):
                warned.append(number)
        assert said == (f"a warning after evaluation {warned[0]}" if warned else "no warning")


def test_a_pair() -> None:
    beta, rows = _find(r"<!-- pair: beta ([0-9.]+) -->\n(.*?)<!-- end -->")
    margin, loss, smoothing, smoothed = _find(
        r"The margin is ([0-9.]+) and the loss ([0-9.]+); with a label smoothing of ([0-9.]+), ([0-9.]+)\."
    )
    answers = [[float(value) for value in row[1:]] for row in _table(rows)]
    rewards = [float(beta) * (policy - reference) for policy, reference, _ in answers]
    assert rewards == pytest.approx([said for _, _, said in answers])
    assert rewards[0] - rewards[1] == pytest.approx(float(margin))
    for label_smoothing, said in ((0.0, loss), (float(smoothing), smoothed)):
        objective = Preference(beta=float(beta), label_smoothing=label_smoothing)
        assert f"{objective.losses(torch.tensor([rewards])).item():.4f}" == said
