"""The fast path against transformers and PEFT in float32 on a CPU: losses, every gradient, curves and what is saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_service.engine.training.batches import MicroBatchLimit
from tests.fakes.fast_models import ALL_SEVEN, fast_gradients, make_fast, make_peft, nats, plain_gradients
from tests.fakes.flat_models import LENGTHS, VOCABULARY_SIZE
from tests.fakes.planned_rows import PlannedRows, make_examples

_LLAMA_3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-scaling": ("llama", _LLAMA_3),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
_TARGETS = {
    "all": ALL_SEVEN,
    "attention": ("q_proj", "v_proj"),
    "middle": ("k_proj", "up_proj"),
    "outputs": ("o_proj", "down_proj"),
}


@pytest.fixture(scope="module")
def rows() -> PlannedRows:
    return PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3))


def _weighted(by_sequence: torch.Tensor) -> torch.Tensor:
    """A loss to which every sequence counts differently, as no mean does."""
    return (by_sequence * torch.linspace(0.5, 2.0, len(by_sequence), dtype=by_sequence.dtype)).sum() / 100


def _compare(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], tolerance: float) -> None:
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        apart = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert apart <= tolerance, f"{name}: {apart:.2e}"


def _check_parity(model_of: Any, rows: PlannedRows, tolerance: float = 1e-5, **settings: Any) -> None:
    reference = model_of()
    expected = nats(reference, rows)
    expected_gradients = plain_gradients(reference, _weighted(expected))
    model = model_of()
    fast = make_fast(model, **settings)
    found = nats(fast, rows)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    _compare(expected_gradients, fast_gradients(model, fast, _weighted(found)), tolerance)


@pytest.mark.parametrize("case", _MODELS)
def test_losses_and_gradients_are_those_of_the_plain_path(case: str, rows: PlannedRows) -> None:
    family, extras = _MODELS[case]
    _check_parity(lambda: make_peft(family, extras), rows)


@pytest.mark.parametrize("case", _TARGETS)
def test_any_of_the_seven_linears_may_be_trained(case: str, rows: PlannedRows) -> None:
    _check_parity(lambda: make_peft(targets=_TARGETS[case]), rows)
