"""How a step ends on the host and on the device: the same weights, moments and numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from gpu_service.engine.failures import RunFailure
from gpu_service.engine.fast_path.flat_adamw import FlatAdamW
from gpu_service.engine.training.updates import UpdatesOnDevice, UpdatesOnHost
from tests.fakes.fast_models import make_fast, make_peft, nats
from tests.fakes.flat_models import VOCABULARY_SIZE
from tests.fakes.planned_rows import PlannedRows, make_examples
from tests.fakes.training_loops import CPU, NUM_STEPS, SETTINGS, LoopTraining, make_training, words_of


def _state(training: LoopTraining) -> list[torch.Tensor]:
    (entry,) = training.optimizer.state.values()
    return [training.model.adapter.detach(), entry["exp_avg"], entry["exp_avg_sq"], torch.as_tensor(entry["step"])]


@pytest.mark.parametrize(
    "spoiled", [{}, {3: math.nan}, {2: math.inf, 3: math.nan}, {1: math.nan}, {NUM_STEPS: math.inf}]
)
def test_both_decide_alike(spoiled: dict[int, float]) -> None:
    trainings = [make_training(on_device=on_device, spoiled=spoiled, save_every=2) for on_device in (False, True)]
    for one in trainings:
        assert not one.loop.run()
    host, device = trainings
    assert host.numbers == device.numbers
    assert [event.step for event in device.reporter.steps] == list(range(1, NUM_STEPS + 1))
    assert [event.skipped for event in device.reporter.steps] == [step + 1 in spoiled for step in range(NUM_STEPS)]
    assert all(torch.equal(*pair) for pair in zip(_state(host), _state(device), strict=True))
    assert host.checkpoints.saved.keys() == device.checkpoints.saved.keys() == {2, 4, 6}
    for step, weights in host.checkpoints.saved.items():
        assert torch.equal(weights, device.checkpoints.saved[step])
    assert words_of(host) == words_of(device)


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_stop_makes_later_steps_do_nothing(fault: float) -> None:
    """The step that was handed out before the bad one's numbers were read leaves everything as it was."""
    training = make_training(on_device=True, policy="stop", spoiled={4: fault})
    before = make_training(on_device=False, policy="stop", spoiled={4: fault})
    for one in (before, training):
        with pytest.raises(RunFailure) as caught:
            one.loop.run()
        assert caught.value.failure.message.startswith(f"the {'loss' if math.isnan(fault) else 'gradient'} of step 4")
    assert before.objective.num_passes == 4
    assert training.objective.num_passes == 5
    assert words_of(training) == words_of(before) == ["step 1", "step 2", "step 3", "step 4", "non-finite-loss"]
    assert training.numbers == before.numbers
    assert all(torch.equal(*pair) for pair in zip(_state(before), _state(training), strict=True))
    assert training.loop.progress.steps_done == 3


def test_a_step_without_weight_is_left_out() -> None:
    model = make_fast(make_peft())
    optimizer = FlatAdamW(model.flat_adapter, SETTINGS)
    before = model.adapter.detach().clone()
    for updates in (
        UpdatesOnHost(optimizer=optimizer, scaler=None),
        UpdatesOnDevice(optimizer=optimizer, inner=optimizer, device=CPU, halts=False),
    ):
        model.adapter.grad = torch.ones_like(model.adapter)
        updates.begin()
        found = updates.apply([torch.zeros(1, 1, dtype=torch.float64)], torch.ones(()), 0)()
        assert (found.is_finite, found.updated, found.rows, found.norm) == (False, False, [[0.0]], 1.0)
        assert torch.equal(model.adapter.detach(), before)
        assert model.adapter.grad is None


def test_saved_state_is_without_the_flag() -> None:
    training = make_training(on_device=True)
    training.loop.run()
    saved = copy.deepcopy(training.optimizer.state_dict())
    assert set(saved) == {"state", "param_groups"}
    again = make_training(on_device=False)
    again.optimizer.load_state_dict(saved)
    rows = PlannedRows(make_examples([9], vocabulary_size=VOCABULARY_SIZE, seed=1))
    assert torch.isfinite(nats(again.model, rows)).all()
