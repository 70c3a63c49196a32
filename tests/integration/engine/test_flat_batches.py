"""A flat batch is its examples one by one: no attention, position or window crosses from one to the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_service.catalog import families
from gpu_service.engine.builders.methods.lora import set_gradient_checkpointing
from gpu_service.engine.training.batches import MicroBatchLimit, collate, split
from gpu_service.engine.training.flat_attention import FlatLayout, attending_within_sequences
from gpu_service.engine.training.likelihood import nats_by_sequence
from tests.fakes.flat_models import CASES, LENGTHS, PLAIN, VOCABULARY_SIZE, WINDOWED, flat_nats, make_model, single_nats
from tests.fakes.planned_rows import PlannedRows, make_example, make_examples
from tunesmith.common.v1 import training_spec_pb2


@pytest.fixture(params=CASES, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(*CASES[request.param])


@pytest.fixture(scope="module")
def rows() -> PlannedRows:
    return PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=1))


def _gradients(model: Any, nats: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(nats.sum() / 100, list(model.parameters())))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_losses_and_gradients_are_those_of_one_by_one(model: Any, rows: PlannedRows, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    single, flat = single_nats(model, rows), flat_nats(model, rows)

    torch.testing.assert_close(flat, single, rtol=1e-5, atol=1e-5)
    for one, other in zip(_gradients(model, flat), _gradients(model, single), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert model.config._attn_implementation == implementation


def test_nothing_of_another_example_is_seen(model: Any, rows: PlannedRows) -> None:
    """Other tokens in one example change the losses of no other by a single bit."""
    changed = 4
    examples = [rows.example(reference) for reference in rows.references]
    examples[changed] = make_example([(token + 7) % VOCABULARY_SIZE for token in examples[changed].tokens.tolist()])
    before, after = flat_nats(model, rows), flat_nats(model, PlannedRows(examples))

    assert before[changed] != after[changed]
    others = [place for place in range(len(LENGTHS)) if place != changed]
    assert torch.equal(before[others], after[others])


@pytest.mark.parametrize(
    "limit",
    [MicroBatchLimit(examples=1), MicroBatchLimit(examples=3), MicroBatchLimit(tokens=48)],
    ids=["one", "three", "48 tokens"],
)
def test_division_into_passes_changes_nothing(rows: PlannedRows, limit: MicroBatchLimit) -> None:
    model = make_model("llama", {})
    torch.testing.assert_close(flat_nats(model, rows, limit), flat_nats(model, rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", families.REGISTRY)
def test_bfloat16_differs_by_less_than_its_rounding(family: str, rows: PlannedRows) -> None:
    model = make_model(family, PLAIN[family], torch.bfloat16)
    targets = torch.tensor([sum(rows.example(reference).mask) or 1 for reference in rows.references])
    with torch.no_grad():
        flat, single = flat_nats(model, rows) / targets, single_nats(model, rows) / targets
    torch.testing.assert_close(flat, single, rtol=1e-3, atol=1e-3)


def test_recomputed_activations_see_the_same(rows: PlannedRows) -> None:
    model = make_model("gemma3", WINDOWED["gemma3"])
    plain = _gradients(model, flat_nats(model, rows))
    set_gradient_checkpointing(model, True)
    with attending_within_sequences(model):
        batch = collate(rows.as_data(), rows.references)
        recomputed = _gradients(model, nats_by_sequence(model, batch))
    for one, other in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_lengths_with_other_frequencies_share_no_pass() -> None:
    """Phi's long positions turn on for a whole pass: a short example beside a long one would be another example."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0 + place for place in range(8)]}
    boundary = 16
    model = make_model(
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": boundary,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": boundary,
                **factors,
            },
        },
    )
    rows = PlannedRows(make_examples((8, 16, 24, 17, 5, 30), vocabulary_size=VOCABULARY_SIZE, seed=2))
    limit = MicroBatchLimit.of(training_spec_pb2.Batch(examples=6), model.config)

    assert limit == MicroBatchLimit(examples=6, boundary_tokens=boundary)
    parts = [[reference.example_index for reference in part] for part in split(rows.as_data(), rows.references, limit)]
    assert parts == [[0, 1], [2, 3], [4], [5]]
    single = single_nats(model, rows)
    torch.testing.assert_close(flat_nats(model, rows, limit), single, rtol=1e-5, atol=1e-5)
    # It does matter: without the boundary the short ones come out otherwise.
    assert not torch.allclose(flat_nats(model, rows), single, rtol=1e-5, atol=1e-5)


def test_a_model_that_loses_the_layout_fails() -> None:
    model = make_model("llama", {})
    ids = torch.arange(6)[None]
    with attending_within_sequences(model), pytest.raises(TypeError, match="flat_layout"):
        model(input_ids=ids, use_cache=False)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with attending_within_sequences(model), pytest.raises(ValueError, match="no attention mask"):
        model(input_ids=ids, attention_mask=mask, use_cache=False, flat_layout=FlatLayout(lengths=(2, 4)))


def test_library_also_tells_examples_apart_by_their_positions(model: Any, rows: PlannedRows) -> None:
    """The second line of defense: outside `attending_within_sequences` transformers' own masks give the same."""
    batch = collate(rows.as_data(), rows.references)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        nats = torch.nn.functional.cross_entropy(logits[0, batch.target_positions], batch.labels, reduction="none")
    parts = torch.split(nats.double(), list(batch.targets_by_sequence))
    sums = torch.stack([part.sum() for part in parts])
    torch.testing.assert_close(sums, flat_nats(model, rows).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (MicroBatchLimit(), [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (MicroBatchLimit(examples=3), [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (MicroBatchLimit(tokens=45), [[0, 1], [2, 3, 4], [5], [6, 7]]),
        (MicroBatchLimit(tokens=45, examples=2), [[0, 1], [2, 3], [4], [5], [6, 7]]),
        (MicroBatchLimit(tokens=1), [[0], [1], [2], [3], [4], [5], [6], [7]]),
    ],
)
def test_passes_keep_order_and_both_limits(
    rows: PlannedRows, limit: MicroBatchLimit, expected: list[list[int]]
) -> None:
    parts = split(rows.as_data(), rows.references, limit)
    assert [[reference.example_index for reference in part] for part in parts] == expected


def test_what_lies_where_in_a_batch(rows: PlannedRows) -> None:
    batch = collate(rows.as_data(), rows.references[1:4])

    assert batch.tokens_by_example == (40, 1, 1)
    assert batch.position_ids[0].tolist() == [*range(40), 0, 0]
    assert batch.targets_by_example == (26, 0, 0)
    assert batch.num_tokens == 42
    assert batch.num_target_tokens == 26
    assert batch.target_positions.tolist() == list(range(13, 39))
    assert batch.labels.tolist() == rows.example(rows.references[1]).tokens.tolist()[14:]
