"""Full training on the fast path against transformers in float32 on a CPU: losses, gradients, curves, what is saved."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from gpu_service.domain.recomputation import Recomputation
from gpu_service.engine.builders.optimizers import adamw
from gpu_service.engine.fast_path import full_reference
from gpu_service.engine.fast_path.full_adamw import FullAdamW
from gpu_service.engine.fast_path.full_model import FullModel, FullSettings
from gpu_service.engine.fast_path.full_weights import WeightsNotSupported
from gpu_service.engine.training import optimizer_state
from gpu_service.engine.training.batches import MicroBatchLimit
from gpu_service.engine.training.updates import LeavesOutSteps, UpdatesOnDevice, UpdatesOnHost
from tests.fakes.fast_models import nats
from tests.fakes.flat_models import LENGTHS, VOCABULARY_SIZE, make_model
from tests.fakes.planned_rows import PlannedRows, make_example, make_examples
from tunesmith.common.v1 import training_spec_pb2

_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}
_SETTINGS = training_spec_pb2.Optimizer(
    learning_rate=1e-3, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1, max_gradient_norm=1.0
)
_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows() -> PlannedRows:
    return PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3))


def _make(
    case: str = "llama", dtype: torch.dtype = torch.float32, held: torch.dtype = torch.float32, **settings: Any
) -> tuple[Any, FullModel]:
    """A model with norms and biases that are not what they begin as, and the fast path over it."""
    family, extras = _MODELS[case]
    model = make_model(family, {**extras, "num_hidden_layers": settings.pop("layers", 2)}, torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model, kernels = model.to(held), settings.pop("kernels", None)
    return model, FullModel(model, FullSettings(device=_CPU, compute_dtype=dtype, **settings), kernels=kernels)


def _make_plain(case: str = "llama") -> Any:
    model, full = _make(case)
    full.release()
    return model


def _weighted(by_sequence: torch.Tensor) -> torch.Tensor:
    """A loss to which every sequence counts differently, as no mean does."""
    return (by_sequence * torch.linspace(0.5, 2.0, len(by_sequence), dtype=by_sequence.dtype)).sum() / 100


def _plain_gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def _gathered(model: Any, full: FullModel, loss: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """By transformers' names; of `loss` alone where one is given."""
    if loss is not None:
        full.gradients.drop()
        torch.autograd.backward(loss)
    flat = full.gradients.flat
    return {name: full.weights.region(one).view(flat).clone() for name, one in model.named_parameters()}


def _compare(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], tolerance: float) -> None:
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        apart = (found[name].float() - gradient).abs().max() / gradient.abs().max()
        assert apart <= tolerance, f"{name}: {apart:.2e}"


@pytest.mark.parametrize("case", _MODELS)
def test_losses_and_gradients_are_those_of_the_plain_path(case: str, rows: PlannedRows) -> None:
    reference = _make_plain(case)
    expected = nats(reference, rows)
    gradients = _plain_gradients(reference, _weighted(expected))
    model, full = _make(case)
    found = nats(full, rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    _compare(gradients, _gathered(model, full, _weighted(found)), 2e-5)
    assert all(parameter.grad is None for parameter in [*model.parameters(), *full.parameters()])


@pytest.mark.parametrize("case", ["llama", "qwen3-tied"])
def test_targets_that_count_alike_are_weighed_in_the_forward_pass(case: str, rows: PlannedRows) -> None:
    """What is made there is as right as what is made anew; and not taken where another pass has been since."""
    reference = _make_plain(case)
    expected = _plain_gradients(reference, nats(reference, rows).sum() / 7)
    model, full = _make(case)
    _compare(expected, _gathered(model, full, nats(full, rows).sum() / 7), 2e-5)
    full.gradients.drop()
    first, second = (nats(full, PlannedRows([rows.example(reference)])) for reference in rows.references[4:6])
    torch.autograd.backward(first.sum())
    torch.autograd.backward(second.sum())
    found = _gathered(model, full)
    loss = nats(reference, rows)[4:6].sum()
    _compare(_plain_gradients(reference, loss), found, 2e-5)


@pytest.mark.parametrize("case", ["llama-tied", "qwen3"])
def test_bfloat16_differs_by_rounding_alone(case: str, rows: PlannedRows) -> None:
    reference = _make_plain(case)
    exact = _plain_gradients(reference, _weighted(nats(reference, rows)))
    plain = _make_plain(case)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = _plain_gradients(plain, _weighted(nats(plain, rows)))
    model, full = _make(case, torch.bfloat16)
    assert full.gradients.flat.dtype is torch.bfloat16
    found = _gathered(model, full, _weighted(nats(full, rows)))

    def apart(gradients: dict[str, torch.Tensor]) -> float:
        whole = torch.cat([exact[name].flatten() for name in exact])
        other = torch.cat([gradients[name].float().flatten() for name in exact])
        return float((other - whole).norm() / whole.norm())

    assert 1e-4 < apart(found) < max(0.05, 1.5 * apart(rounded))


_RECOMPUTATIONS = {
    "elementwise": Recomputation(elementwise_layers=2),
    "feed-forward": Recomputation(feed_forward_layers=1, elementwise_layers=1),
    "whole": Recomputation(full_layers=2),
    "offloaded": Recomputation(full_layers=3, feed_forward_layers=1, offload=True),
}


@pytest.mark.parametrize("case", _RECOMPUTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_nothing(case: str, dtype: torch.dtype, rows: PlannedRows) -> None:
    found: list[list[torch.Tensor]] = []
    for recomputation in (Recomputation(), _RECOMPUTATIONS[case]):
        model, full = _make("qwen3", dtype, recomputation=recomputation, layers=4)
        # A pass that failed leaves what it had put away behind.
        nats(full, rows)
        values = nats(full, rows)
        found.append([values, *_gathered(model, full, _weighted(values)).values()])
    assert all(torch.equal(before, after) for before, after in zip(*found, strict=True))


@pytest.mark.parametrize("case", ["llama", "qwen3-tied"])
def test_passes_of_any_size_add_up(case: str, rows: PlannedRows) -> None:
    model, full = _make(case, accumulates=True)
    whole = _gathered(model, full, nats(full, rows).sum())
    full.gradients.drop()
    for reference in rows.references:
        torch.autograd.backward(nats(full, PlannedRows([rows.example(reference)])).sum())
    _compare(whole, _gathered(model, full), 2e-5)


def test_passes_add_up_in_float32(rows: PlannedRows) -> None:
    """However many there are: each adds less than bfloat16 could tell."""
    model, full = _make("llama", torch.bfloat16, accumulates=True)
    one = _gathered(model, full, nats(full, rows).sum())
    assert all(gradient.dtype is torch.float32 for gradient in one.values())
    for _ in range(15):
        torch.autograd.backward(nats(full, rows).sum())
    for name, gradient in _gathered(model, full).items():
        torch.testing.assert_close(gradient, 16 * one[name], rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


class _FailsOnce:
    """Runs out of memory at one weight's gradient, the first time."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __getattr__(self, name: str) -> Any:
        return getattr(full_reference, name)

    def weigh(self, *arguments: Any, **options: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise torch.OutOfMemoryError("for a test")
        full_reference.weigh(*arguments, **options)


@pytest.mark.parametrize("at", [1, 3, 9])
def test_a_pass_that_runs_out_of_memory_is_made_again(at: int, rows: PlannedRows) -> None:
    """Of what it had gathered nothing is left, in whatever weight it failed, nor of a pass before it in the step."""
    model, full = _make("llama-tied")
    expected = _gathered(model, full, nats(full, rows).sum())
    model, full = _make("llama-tied", kernels=_FailsOnce(at + 9))
    torch.autograd.backward(nats(full, rows).sum())
    with pytest.raises(torch.OutOfMemoryError):
        torch.autograd.backward(nats(full, rows).sum())
    FullAdamW(full.weights, full.gradients, _SETTINGS).zero_grad()
    torch.autograd.backward(nats(full, rows).sum())
    found = _gathered(model, full)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_pass_without_a_target_costs_nothing() -> None:
    model, full = _make()
    found = nats(full, PlannedRows([make_example([3, 4, 5], [0, 0, 0]), make_example([6])]))
    assert found.tolist() == [0, 0]
    assert all(not gradient.any() for gradient in _gathered(model, full, found.sum()).values())


def test_examples_do_not_see_each_other(rows: PlannedRows) -> None:
    examples = [rows.example(reference) for reference in rows.references]
    others = make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=4)
    _, full = _make()
    before = nats(full, rows)
    after = nats(full, PlannedRows([*examples[:5], others[5], *examples[6:]]))
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[6:], after[6:])
    assert before[5] != after[5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_beside_it_stays_right(dtype: torch.dtype, rows: PlannedRows) -> None:
    """What is sampled and saved is transformers' model: steps change it, and what is put into it counts."""
    model, full = _make("llama-tied", dtype)
    optimizer = FullAdamW(full.weights, full.gradients, _SETTINGS)
    before = nats(full, rows).detach()
    _steps(full, optimizer, rows, 2)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    with torch.no_grad():
        torch.testing.assert_close(nats(model, rows), nats(full, rows), rtol=tolerance, atol=tolerance)
        assert not torch.allclose(nats(full, rows), before, rtol=tolerance)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        torch.testing.assert_close(nats(full, rows), nats(model, rows), rtol=tolerance, atol=tolerance)
    full.release()
    full.release()
    assert torch.isfinite(nats(model, rows)).all()


def _steps(
    model: Any, optimizer: Any, rows: PlannedRows, count: int, *, limit: float = 1.0, passes: int | None = None
) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = nats(model, rows, MicroBatchLimit(examples=passes)).sum() / 100
        torch.autograd.backward(loss)
        if isinstance(optimizer, FullAdamW):
            optimizer.clip(limit)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("limit", [0.1, math.inf])
def test_curve_and_optimizer_are_those_of_the_plain_path(limit: float, rows: PlannedRows) -> None:
    reference = _make_plain("qwen3")
    plain_optimizer = adamw.build(reference.parameters(), _SETTINGS)
    expected = _steps(reference, plain_optimizer, rows, 20, limit=limit)
    model, full = _make("qwen3")
    optimizer = FullAdamW(full.weights, full.gradients, _SETTINGS)
    found = _steps(full, optimizer, rows, 20, limit=limit)
    assert expected[-1] < expected[0] - 0.1
    assert found == pytest.approx(expected, rel=1e-4)
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-2, atol=5e-4, msg=name)
    ours, theirs = optimizer_state.flatten(optimizer), optimizer_state.flatten(plain_optimizer)
    assert ours.groups == theirs.groups
    assert ours.document() == theirs.document()
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, rtol=2e-2, atol=1e-4 * float(tensor.abs().max()))


def test_long_curve_in_bfloat16_is_that_of_float32(rows: PlannedRows) -> None:
    reference = _make_plain("llama-tied")
    expected = _steps(reference, adamw.build(reference.parameters(), _SETTINGS), rows, 200)
    _, full = _make("llama-tied", torch.bfloat16)
    found = _steps(full, FullAdamW(full.weights, full.gradients, _SETTINGS), rows, 200)
    assert expected[-1] < 0.5 * expected[0]
    assert found == pytest.approx(expected, rel=0.02, abs=0.005 * expected[0])


def test_either_path_goes_on_from_the_others_state(rows: PlannedRows) -> None:
    def plain_from(weights: dict[str, torch.Tensor], document: Any, saved: Any) -> list[float]:
        model = _make_plain()
        model.load_state_dict(weights)
        optimizer = adamw.build(model.parameters(), _SETTINGS)
        # What is loaded is stepped in place.
        optimizer_state.load(optimizer, document, {name: value.clone() for name, value in saved.items()})
        return _steps(model, optimizer, rows, 3)

    model, full = _make()
    optimizer = FullAdamW(full.weights, full.gradients, _SETTINGS)
    _steps(full, optimizer, rows, 3)
    state = optimizer_state.flatten(optimizer)
    saved = {name: tensor.clone() for name, tensor in optimizer_state.apart(state.tensors).items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    document = json.loads(json.dumps(state.document()))
    digest = optimizer_state.digest_of_optimizer(optimizer)
    expected = _steps(full, optimizer, rows, 3)
    assert plain_from(weights, document, saved) == pytest.approx(expected, rel=1e-4)

    model, full = _make()
    optimizer = FullAdamW(full.weights, full.gradients, _SETTINGS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    optimizer_state.load(optimizer, document, saved)
    assert optimizer_state.digest_of_optimizer(optimizer) == digest
    assert _steps(full, optimizer, rows, 3) == expected


def test_state_of_another_model_is_refused() -> None:
    _, full = _make("llama")
    _, other = _make("llama-biases")
    optimizer = FullAdamW(full.weights, full.gradients, _SETTINGS)
    with pytest.raises(ValueError, match="other parameters"):
        optimizer.load_state_dict(FullAdamW(other.weights, other.gradients, _SETTINGS).state_dict())


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(fault: float, rows: PlannedRows) -> None:
    """Decided on the device or on the host, and the step after it is as if it had not been."""
    losses = []
    for on_device in (True, False):
        _, full = _make("llama", torch.bfloat16)
        optimizer = FullAdamW(full.weights, full.gradients, _SETTINGS)
        assert isinstance(optimizer, LeavesOutSteps)
        updates = (
            UpdatesOnDevice(optimizer=optimizer, inner=optimizer, device=_CPU, halts=False)
            if on_device
            else UpdatesOnHost(optimizer=optimizer, scaler=None)
        )
        values = [torch.ones(1, 1, dtype=torch.float64)]
        found = []
        for spoils in (False, True, False):
            before = [one.clone() for one in (full.weights.held, full.weights.working, *optimizer._moments.values())]
            updates.begin()
            loss = nats(full, rows).sum() / 100
            torch.autograd.backward(loss * fault if spoils else loss)
            numbers = updates.apply(values, optimizer.clip(1.0), 1)()
            assert numbers.is_finite is not spoils
            after = (full.weights.held, full.weights.working, *optimizer._moments.values())
            assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)) is spoils
            assert full.gradients.is_empty
            found.append(loss.item())
        assert optimizer.state_dict()["state"][0]["step"] == 2
        losses.append(found)
    assert losses[0] == losses[1]


def test_what_it_does_not_train_is_refused() -> None:
    model = make_model("llama", {})
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(WeightsNotSupported, match="extra"):
        FullModel(model, FullSettings(device=_CPU, compute_dtype=torch.float32))
    model = make_model("llama", {"attention_bias": True})
    model.model.layers[1].self_attn.k_proj.bias = None
    with pytest.raises(WeightsNotSupported, match="bias"):
        FullModel(model, FullSettings(device=_CPU, compute_dtype=torch.float32))
    model = make_model("llama", {})
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(WeightsNotSupported):
        FullModel(model, FullSettings(device=_CPU, compute_dtype=torch.float32))


def test_gradients_without_room_in_another_type_stay_in_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    _, full = _make(dtype=torch.bfloat16)
    zeros = torch.zeros

    def without_room(*sizes: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.float32:
            raise torch.OutOfMemoryError("no room")
        return zeros(*sizes, **options)

    monkeypatch.setattr(torch, "zeros", without_room)
    assert "no memory for gradients in float32" in full.prepare_adding_up()
    assert full.gradients.flat.dtype is torch.bfloat16
    assert len(full.gradients.flat) == len(full.weights.held)
    # Said once, and nothing is there to be taken back.
    assert (full.prepare_adding_up(), full.narrow_gradients()) == ("", "")
