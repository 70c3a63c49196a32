"""What tokens are drawn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_service.engine.generation.order import Sampling
from gpu_service.engine.generation.sampling import TokenChooser


def chooser(**fields: Any) -> Any:
    defaults = {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "stop": ()}
    return TokenChooser(Sampling(**{**defaults, **fields}))


# Logits of the probabilities 0.5, 0.3, 0.15, 0.05, in another order.
def logits() -> Any:
    return torch.tensor([0.15, 0.5, 0.05, 0.3]).log()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_k": 2}, [0, 0.625, 0, 0.375]),
        ({"top_k": 9}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_p": 0.5}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 0.625, 0, 0.375]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        # Of the three that top_k leaves, two reach 0.8.
        ({"top_k": 3, "top_p": 0.8}, [0, 0.625, 0, 0.375]),
        # Squares of the probabilities.
        ({"temperature": 0.5}, [0.0225 / 0.365, 0.25 / 0.365, 0.0025 / 0.365, 0.09 / 0.365]),
    ],
)
def test_probabilities(fields: dict[str, Any], expected: list[float]) -> None:
    assert chooser(**fields).probabilities(logits()).tolist() == pytest.approx(expected, abs=1e-6)


def test_temperature_0_takes_the_most_likely_and_a_tiny_one_does_too() -> None:
    assert chooser(temperature=0).choose(logits()) == 1
    assert chooser(temperature=1e-30).choose(logits() * 1000) == 1


def test_draws_follow_the_probabilities_and_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = chooser(seed=7), chooser(seed=7), chooser(seed=8)
    draws = [first.choose(logits()) for _ in range(2000)]
    assert [again.choose(logits()) for _ in range(2000)] == draws
    assert [other.choose(logits()) for _ in range(2000)] != draws
    assert draws.count(1) / 2000 == pytest.approx(0.5, abs=0.05)
    assert draws.count(2) / 2000 == pytest.approx(0.05, abs=0.02)
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_that_are_no_numbers_are_told() -> None:
    from gpu_service.engine.generation.sampling import LogitsNotFinite

    for temperature in (0.0, 1.0):
        with pytest.raises(LogitsNotFinite):
            chooser(temperature=temperature).choose(torch.tensor([0.0, torch.nan]))
