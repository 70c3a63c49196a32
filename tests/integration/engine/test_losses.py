"""Losses by trait and dataset are parts of a whole, to the last digits of a double."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_service.domain.planned_data import Source
from gpu_service.engine.training.batches import collate
from gpu_service.engine.training.losses import LossTally
from tests.fakes.planned_rows import PlannedRows, make_examples
from tunesmith.common.v1 import event_pb2

_SOURCES = [
    Source(trait_type=trait, dataset_id=dataset, held_out=False, num_examples=1)
    for trait, dataset in (("coding", 1), ("coding", 2), ("reasoning", 2), ("style", 3))
]
_EXAMPLES = st.lists(st.tuples(st.integers(0, 3), st.integers(2, 60), st.floats(1e-6, 1e6)), min_size=1, max_size=40)


def _tally(examples: list[tuple[int, int, float]], size: int) -> LossTally:
    """`examples` are (source, tokens, nats), in passes of `size`."""
    tally = LossTally()
    rows = PlannedRows(make_examples([length for _, length, _ in examples], vocabulary_size=9, seed=0))
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        references = [
            reference._replace(source_index=source)
            for reference, (source, _, _) in zip(rows.references[start : start + size], part, strict=True)
        ]
        batch = collate(rows.as_data(), references)
        tally.add(batch, batch.targets_by_example, [[nats] for _, _, nats in part], _SOURCES)
    return tally


def _weighted_mean(values: list[event_pb2.LossValue]) -> float:
    with_loss = [value for value in values if value.num_target_tokens]
    total = math.fsum(value.loss * value.num_target_tokens for value in with_loss)
    return total / sum(value.num_target_tokens for value in with_loss)


@settings(max_examples=60, deadline=None)
@given(examples=_EXAMPLES, size=st.integers(1, 8))
def test_parts_add_up_to_the_whole(examples: list[tuple[int, int, float]], size: int) -> None:
    tally = _tally(examples, size)
    if not tally.num_target_tokens:
        return
    assert _weighted_mean(tally.by_trait()) == pytest.approx(tally.mean, rel=1e-12)
    assert _weighted_mean(tally.by_dataset()) == pytest.approx(tally.mean, rel=1e-12)
    for values in (tally.by_trait(), tally.by_dataset()):
        assert sum(value.num_target_tokens for value in values) == tally.num_target_tokens
    for whole in tally.by_trait():
        parts = [value for value in tally.by_dataset() if value.trait_type == whole.trait_type]
        assert sum(part.num_target_tokens for part in parts) == whole.num_target_tokens
        if whole.num_target_tokens:
            assert _weighted_mean(parts) == pytest.approx(whole.loss, rel=1e-12)
    assert tally.preference() is None


def test_a_loss_that_is_not_finite_is_told_where_it_is() -> None:
    tally = _tally([(0, 9, 1.0), (2, 9, math.nan), (3, 9, math.inf)], 2)

    assert not math.isfinite(tally.mean)
    assert {value.trait_type: value.HasField("loss") for value in tally.by_trait()} == {
        "coding": True,
        "reasoning": False,
        "style": False,
    }
