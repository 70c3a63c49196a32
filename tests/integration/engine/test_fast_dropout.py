"""Dropout of the fast path: masks, their gradients against PEFT's with the same masks, and that they come again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_service.domain.recomputation import Recomputation
from gpu_service.engine.fast_path.dropout import LAYERS_PER_GROUP, keep_mask
from gpu_service.engine.fast_path.model import GROUPS
from tests.fakes.fast_models import ALL_SEVEN, fast_gradients, hold_in_nf4, make_fast, make_peft, nats, plain_gradients
from tests.fakes.flat_models import LENGTHS, VOCABULARY_SIZE
from tests.fakes.planned_rows import PlannedRows, make_examples

_SEED, _PROBABILITY = 5, 0.25


@pytest.fixture(scope="module")
def rows() -> PlannedRows:
    return PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3))


def _key(seed: int = _SEED) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randint(2**62, (1,))


class _Masked(torch.nn.Module):
    """PEFT's dropout with a mask that is given."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self._layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = keep_mask(_key(), self._layer, x.shape[-2], x.shape[-1], _PROBABILITY)
        return x * kept / (1 - _PROBABILITY)


def _each_covered(model: Any) -> Any:
    """Every layer with an adapter, and the number that its masks go by."""
    for number, layer in enumerate(model.base_model.model.model.layers):
        for group, (part, names) in enumerate(GROUPS):
            covered = [getattr(getattr(layer, part), name) for name in names]
            covered = [module for module in covered if hasattr(module, "lora_A")]
            for place, module in enumerate(covered):
                yield module, LAYERS_PER_GROUP * (len(GROUPS) * number + group) + place


def _make(family: str = "llama", *, masked: bool = False, **options: Any) -> Any:
    model = make_peft(family, **options)
    for module, layer in _each_covered(model):
        module.lora_dropout["default"] = _Masked(layer) if masked else torch.nn.Dropout(_PROBABILITY)
    return model.train()


@pytest.mark.parametrize("targets", [ALL_SEVEN, ("k_proj", "up_proj"), ("q_proj", "v_proj", "down_proj")])
@pytest.mark.parametrize("quantize", [None, hold_in_nf4])
def test_gradients_are_those_of_peft_with_the_same_masks(targets: Any, quantize: Any, rows: PlannedRows) -> None:
    reference = _make(masked=True, targets=targets, quantize=quantize)
    expected = nats(reference, rows)
    expected_gradients = plain_gradients(reference, expected.sum() / 100)
    model = _make(targets=targets, quantize=quantize)
    fast = make_fast(model)
    torch.manual_seed(_SEED)
    found = nats(fast, rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in fast_gradients(model, fast, found.sum() / 100).items():
        apart = (gradient - expected_gradients[name]).abs().max() / expected_gradients[name].abs().max()
        assert apart <= 1e-5, name
    fast.eval()
    plain = make_fast(make_peft(targets=targets, quantize=quantize))
    # Nothing is dropped outside training, and much in it.
    assert torch.equal(nats(fast, rows), nats(plain, rows))
    assert (found - nats(plain, rows)).abs().max() > 1e-2


def test_mask_is_the_same_again_and_another_elsewhere() -> None:
    key, other = _key(1), _key(2)
    mask = keep_mask(key, 3, 64, 512, _PROBABILITY)
    assert torch.equal(mask, keep_mask(key, 3, 64, 512, _PROBABILITY))
    # A longer pass has the same rows first.
    assert torch.equal(mask, keep_mask(key, 3, 80, 600, _PROBABILITY)[:64, :512])
    assert mask.float().mean() == pytest.approx(1 - _PROBABILITY, abs=0.01)
    assert mask.float().mean(0).std() < 3 * (0.25 * 0.75 / 64) ** 0.5
    assert mask.float().mean(1).std() < 3 * (0.25 * 0.75 / 512) ** 0.5
    independent = (1 - _PROBABILITY) ** 2 + _PROBABILITY**2
    others = (
        keep_mask(key, 4, 64, 512, _PROBABILITY),
        keep_mask(other, 3, 64, 512, _PROBABILITY),
        mask.roll(1, 0),
        mask.roll(1, 1),
    )
    for one in others:
        assert (mask == one).float().mean() == pytest.approx(independent, abs=0.015)


@pytest.mark.parametrize(
    "recomputation",
    [
        Recomputation(elementwise_layers=2),
        Recomputation(full_layers=1, feed_forward_layers=1),
        Recomputation(full_layers=2, offload=True),
    ],
)
def test_what_is_recomputed_finds_its_masks(recomputation: Recomputation, rows: PlannedRows) -> None:
    found = []
    for one in (Recomputation(), recomputation):
        model = _make("qwen3", dtype=torch.bfloat16)
        fast = make_fast(model, dtype=torch.bfloat16, recomputation=one)
        torch.manual_seed(_SEED)
        values = nats(fast, rows)
        # Something else is measured before the gradient is taken.
        with torch.no_grad():
            fast.eval()
            nats(fast, rows)
            fast.train()
        found.append([values, *fast_gradients(model, fast, values.sum()).values()])
    assert all(torch.equal(before, after) for before, after in zip(*found, strict=True))


def test_each_pass_has_a_mask_of_its_own(rows: PlannedRows) -> None:
    fast = make_fast(_make())
    torch.manual_seed(_SEED)
    state = torch.get_rng_state()
    first, second = nats(fast, rows), nats(fast, rows)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(first, nats(fast, rows))
    plain = make_fast(make_peft())
    # Without dropout no random number is spent.
    before = torch.get_rng_state()
    nats(plain, rows)
    assert torch.equal(before, torch.get_rng_state())
