"""Full training in little memory: the same gradients as elsewhere, steps that round by chance, and what it refuses."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from gpu_service.domain.recomputation import everything
from gpu_service.engine.fast_path import adam_8bit
from gpu_service.engine.fast_path.consuming_adamw import ConsumingAdamW
from gpu_service.engine.fast_path.full_adamw import FullAdamW
from gpu_service.engine.fast_path.full_low_memory import LowMemoryModel
from gpu_service.engine.fast_path.full_model import FullModel, FullSettings
from gpu_service.engine.fast_path.full_reference import AdamSettings, StepNumbers
from gpu_service.engine.training import optimizer_state
from gpu_service.engine.training.updates import LeavesOutSteps, UpdatesOnDevice
from tests.fakes.fast_models import nats
from tests.fakes.flat_models import LENGTHS, VOCABULARY_SIZE, make_model
from tests.fakes.planned_rows import PlannedRows, make_examples
from tunesmith.common.v1 import training_spec_pb2

_SETTINGS = training_spec_pb2.Optimizer(
    learning_rate=1e-3, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1, max_gradient_norm=1.0
)
_CPU = torch.device("cpu")
_STEP = StepNumbers(learning_rate=1e-3, numbers=torch.tensor([1e-3, 1.0, 1.0, 1.0]))
_ADAM = AdamSettings(beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.0)


@pytest.fixture(scope="module")
def rows() -> PlannedRows:
    return PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3))


def _make(family: str = "llama", extras: dict[str, Any] | None = None, kind: Any = LowMemoryModel) -> tuple[Any, Any]:
    model = make_model(family, extras or {}, torch.float32).to(torch.bfloat16)
    return model, kind(model, FullSettings(device=_CPU, compute_dtype=torch.bfloat16, recomputation=everything(2)))


def _steps(full: Any, optimizer: Any, rows: PlannedRows, count: int, limit: float = 1.0) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = nats(full, rows).sum() / 100
        torch.autograd.backward(loss)
        optimizer.clip(limit)
        optimizer.step()
        losses.append(loss.item())
    return losses


_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", _CASES)
def test_gradients_are_those_that_are_kept_elsewhere(case: str, rows: PlannedRows) -> None:
    """To the last bit, in both passes back; every weight's comes once."""
    model, kept = _make(*_CASES[case], kind=FullModel)
    torch.autograd.backward(nats(kept, rows).sum())
    norm = float(kept.gradients.norm())
    _, full = _make(*_CASES[case])
    torch.autograd.backward(nats(full, rows).sum())
    for is_last in (False, True):
        found: dict[int, torch.Tensor] = {}
        full.sweep(lambda region, gradient, into=found: into.update({region.start: gradient.clone()}), is_last=is_last)
        assert sum(one.numel() for one in found.values()) == sum(one.numel() for one in model.parameters())
        for start, gradient in found.items():
            assert torch.equal(gradient.flatten(), kept.gradients.flat[start : start + gradient.numel()])
    assert full.is_empty
    torch.autograd.backward(nats(full, rows).sum())
    optimizer = ConsumingAdamW(full, _SETTINGS, seed=0)
    assert float(optimizer.clip(1.0)) == pytest.approx(norm, rel=1e-3)


def test_curve_is_that_of_float32(rows: PlannedRows) -> None:
    """But for rounding by chance."""
    _, full = _make("qwen3")
    found = _steps(full, ConsumingAdamW(full, _SETTINGS, seed=0), rows, 60)
    model = make_model("qwen3", {})
    exact = FullModel(model, FullSettings(device=_CPU, compute_dtype=torch.float32))
    expected = _steps(exact, FullAdamW(exact.weights, exact.gradients, _SETTINGS), rows, 60)
    assert expected[-1] < 0.7 * expected[0]
    assert found == pytest.approx(expected, rel=0.03)


def test_steps_that_are_smaller_than_a_weights_next_number_add_up(rows: PlannedRows) -> None:
    """Nearest rounding would make none of them: weights of 1 and steps of a thousandth of what lies between numbers."""
    weights = torch.ones(2048, dtype=torch.bfloat16)
    moments = _moments(2048)
    step = StepNumbers(learning_rate=1e-5, numbers=torch.tensor([1e-5, 1.0, 1.0, 1.0]))
    for number in range(100):
        adam_8bit.step_adamw_8bit(
            weights, torch.ones(2048, dtype=torch.bfloat16), moments, step,
            AdamSettings(beta1=0.0, beta2=0.0, epsilon=1e-8, weight_decay=0.0),
            key=torch.tensor([number]), first_element=0,
        )  # fmt: skip
    assert float(weights.float().mean()) == pytest.approx(1 - 100 * 1e-5, abs=2e-4)


def _moments(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    blocks = -(-count // 256)
    return (
        torch.zeros(count, dtype=torch.int8),
        torch.zeros(blocks),
        torch.zeros(count, dtype=torch.uint8),
        torch.zeros(blocks),
    )


def test_moments_are_expected_to_be_what_they_were() -> None:
    """The mean over many keys is the moment itself; every one of them is within a code of it."""
    gradient = torch.randn(512, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 0, 512)
    firsts, seconds = [], []
    for number in range(2000):
        moments = _moments(512)
        adam_8bit.step_adamw_8bit(
            torch.zeros(512, dtype=torch.bfloat16), gradient, moments, _STEP, _ADAM,
            key=torch.tensor([number]), first_element=1024,
        )  # fmt: skip
        firsts.append(adam_8bit.read_first(moments[0], moments[1]))
        seconds.append(adam_8bit.read_second(moments[2], moments[3]))
    first, second = 0.1 * gradient, 0.01 * gradient.square()
    for found, expected in ((torch.stack(firsts), first), (torch.stack(seconds), second)):
        blocks = expected.abs().view(2, 256).amax(1).repeat_interleave(256)
        error = (found.mean(0) - expected).abs()
        # What chance leaves of so many, and what the smallest code above zero adds.
        assert bool((error <= 5 * found.std(0) / math.sqrt(2000) + 1e-6 * blocks).all())
        assert bool(((found - expected).abs() <= 0.035 * blocks).all())
    assert bool((torch.stack(seconds)[:, gradient != 0] > 0).all())


def test_weights_of_float32_would_not_be_rounded() -> None:
    weights = torch.randn(300, generator=torch.Generator().manual_seed(2))
    expected = weights - 1e-3 * torch.sign(weights)
    adam_8bit.step_adamw_8bit(
        weights, weights.clone(), _moments(300), _STEP,
        AdamSettings(beta1=0.0, beta2=0.0, epsilon=1e-12, weight_decay=0.0), key=torch.tensor([3]), first_element=0,
    )  # fmt: skip
    torch.testing.assert_close(weights, expected)


def test_going_on_from_saved_state_is_exact(rows: PlannedRows) -> None:
    model, full = _make("llama", {"tie_word_embeddings": True})
    optimizer = ConsumingAdamW(full, _SETTINGS, seed=7)
    _steps(full, optimizer, rows, 3)
    state = optimizer_state.flatten(optimizer)
    saved = {name: tensor.clone() for name, tensor in optimizer_state.apart(state.tensors).items()}
    weights = {name: value.clone() for name, value in model.named_parameters()}
    document = json.loads(json.dumps(state.document()))
    digest = optimizer_state.digest_of_optimizer(optimizer)
    expected = _steps(full, optimizer, rows, 3)

    model, full = _make("llama", {"tie_word_embeddings": True})
    optimizer = ConsumingAdamW(full, _SETTINGS, seed=7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    optimizer_state.load(optimizer, document, saved)
    assert optimizer_state.digest_of_optimizer(optimizer) == digest
    assert _steps(full, optimizer, rows, 3) == expected
    _, other = _make()
    with pytest.raises(ValueError, match="other weights"):
        optimizer_state.load(ConsumingAdamW(other, _SETTINGS, seed=7), document, saved)
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer_state.load(optimizer, document, {name: value for name, value in saved.items() if "codes" not in name})


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(fault: float, rows: PlannedRows) -> None:
    _, full = _make()
    optimizer = ConsumingAdamW(full, _SETTINGS, seed=0)
    assert isinstance(optimizer, LeavesOutSteps)
    updates = UpdatesOnDevice(optimizer=optimizer, inner=optimizer, device=_CPU, halts=False)
    values = [torch.ones(1, 1, dtype=torch.float64)]
    for spoils in (False, True, False):
        before = [one.clone() for one in (full.weights.held, *optimizer._moments)]
        updates.begin()
        loss = nats(full, rows).sum() / 100
        torch.autograd.backward(loss * fault if spoils else loss)
        numbers = updates.apply(values, optimizer.clip(1.0), 1)()
        assert numbers.is_finite is not spoils
        after = (full.weights.held, *optimizer._moments)
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)) is spoils
        assert full.is_empty
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_steps_of_several_passes_are_refused(rows: PlannedRows) -> None:
    """Nothing of theirs is mixed up; the next step is whole."""
    _, full = _make()
    optimizer = ConsumingAdamW(full, _SETTINGS, seed=0)
    before = full.weights.held.clone()
    torch.autograd.backward(nats(full, rows).sum())
    with pytest.raises(torch.OutOfMemoryError, match="one pass"):
        torch.autograd.backward(nats(full, rows).sum())
    assert torch.equal(full.weights.held, before)
    _steps(full, optimizer, rows, 1)
    assert not torch.equal(full.weights.held, before)
