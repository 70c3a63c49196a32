"""How a step ends on the host and on the device: the same weights, moments and numbers; and a loop that runs ahead."""

from __future__ import annotations

import copy
import math
import threading
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from gpu_service.engine.devices import CpuDevice
from gpu_service.engine.failures import RunFailure
from gpu_service.engine.fast_path.flat_adamw import FlatAdamW
from gpu_service.engine.request import DeviceChoice
from gpu_service.engine.stopping import StopMode, StopRequested, StopSwitch
from gpu_service.engine.training import batches
from gpu_service.engine.training import loop as loop_module
from gpu_service.engine.training.batches import MicroBatch, MicroBatchLimit
from gpu_service.engine.training.loop import TrainingLoop
from gpu_service.engine.training.objectives import Outcome
from gpu_service.engine.training.out_of_memory import PassSize
from gpu_service.engine.training.progress import TrainingProgress
from gpu_service.engine.training.step_telling import IssuedStep, StepTeller
from gpu_service.engine.training.updates import StepNumbers, UpdatesOnDevice, UpdatesOnHost
from tests.fakes.fast_models import make_fast, make_peft, nats
from tests.fakes.flat_models import VOCABULARY_SIZE
from tests.fakes.planned_rows import PlannedRows, make_examples
from tunesmith.common.v1 import event_pb2, training_spec_pb2

_CPU = torch.device("cpu")
_SETTINGS = training_spec_pb2.Optimizer(
    learning_rate=1e-2, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.01, max_gradient_norm=1.0
)
_STEPS = 6


class _Accelerator:
    """What the loop asks of accelerate where nothing is scaled."""

    device = _CPU
    scaler = None

    def backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(loss)

    def clip_grad_norm_(self, parameters: list[torch.Tensor], limit: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)


class _Objective:
    """Likelihood; the passes of some steps, counted from 1, are spoiled."""

    def __init__(self, spoiled: dict[int, float]) -> None:
        self._spoiled = spoiled
        self.num_passes = 0

    def weights(self, batch: MicroBatch) -> tuple[int, ...]:
        return batch.targets_by_example

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        self.num_passes += 1
        found = model.nats_by_sequence(batch)
        total = found.sum() * self._spoiled.get(self.num_passes, 1.0)
        is_lost = math.isnan(self._spoiled.get(self.num_passes, 1.0))
        return Outcome(total=total, values=(found * math.nan if is_lost else found).detach()[:, None])


class _Reporter:
    def __init__(self) -> None:
        self.said: list[Any] = []

    def emit(self, message: Any) -> None:
        self.said.append(message)

    def warn(self, code: str, message: str, **about: Any) -> None:
        self.said.append(code)

    def enter_phase(self, name: str) -> None:
        self.said.append(name)

    def enter_stopping(self) -> None:
        self.said.append("STOPPING")

    @property
    def steps(self) -> list[event_pb2.StepEvent]:
        return [one for one in self.said if isinstance(one, event_pb2.StepEvent)]


class _Checkpoints:
    """Remembers the weights of every save, and after how many steps."""

    def __init__(self) -> None:
        self.model: Any = None
        self.saved: dict[int, torch.Tensor] = {}

    def save(self, progress: TrainingProgress) -> None:
        self.saved[progress.steps_done] = self.model.adapter.detach().clone()

    def tell_lost_steps(self, progress: TrainingProgress) -> None:
        assert progress.steps_done in self.saved


class _Steps(PlannedRows):
    """Two examples a step."""

    num_steps = _STEPS

    def step_examples(self, step: int) -> Any:
        return self.references[2 * step : 2 * step + 2]

    def epoch_of_step(self, step: int) -> float:
        return step / _STEPS


@dataclass(kw_only=True)
class _Training:
    loop: TrainingLoop
    reporter: _Reporter
    checkpoints: _Checkpoints
    objective: _Objective
    model: Any
    optimizer: FlatAdamW
    switch: StopSwitch

    @property
    def numbers(self) -> list[tuple[Any, ...]]:
        """What events say but for time and memory."""
        return [
            (one.step, one.loss, one.HasField("loss"), one.gradient_norm, one.learning_rate, one.skipped, one.epoch,
             [value.SerializeToString() for value in one.dataset_losses], one.num_tokens)
            for one in self.reporter.steps
        ]  # fmt: skip


def _make(
    *, on_device: bool, policy: str = "skip", spoiled: dict[int, float] | None = None, save_every: int = 0
) -> _Training:
    model = make_fast(make_peft())
    optimizer = FlatAdamW(model.flat_adapter, _SETTINGS)
    reporter, checkpoints, objective, switch = _Reporter(), _Checkpoints(), _Objective(spoiled or {}), StopSwitch()
    checkpoints.model = model
    progress = TrainingProgress()
    examples = make_examples([9, 17] * _STEPS, vocabulary_size=VOCABULARY_SIZE, seed=0)
    data = _Steps(examples).as_data()
    device = CpuDevice(DeviceChoice(type="cpu", index=-1))
    loop = TrainingLoop(
        accelerator=_Accelerator(),
        model=model,
        optimizer=optimizer,
        data=data,
        settings=training_spec_pb2.Hyperparameters(
            optimizer=_SETTINGS,
            schedule=training_spec_pb2.Schedule(name="linear", warmup_steps=1),
            non_finite_policy=policy,
            save_every_steps=save_every,
        ),
        objective=objective,
        pass_size=PassSize(
            planned=MicroBatchLimit(),
            data=data,
            device=device,
            reporter=reporter,  # type: ignore[arg-type]
            progress=progress,
        ),
        examples_per_epoch=_STEPS,
        checkpoints=checkpoints,  # type: ignore[arg-type]
        progress=progress,
        device=device,
        switch=switch,
        reporter=reporter,  # type: ignore[arg-type]
        evaluate=lambda: None,
    )
    if on_device:
        loop._updates = UpdatesOnDevice(optimizer=optimizer, inner=optimizer, device=_CPU, halts=policy == "stop")
    else:
        assert isinstance(loop._updates, UpdatesOnHost)
    return _Training(
        loop=loop, reporter=reporter, checkpoints=checkpoints, objective=objective, model=model, optimizer=optimizer,
        switch=switch,
    )  # fmt: skip


def _state(training: _Training) -> list[torch.Tensor]:
    (entry,) = training.optimizer.state.values()
    return [training.model.adapter.detach(), entry["exp_avg"], entry["exp_avg_sq"], torch.as_tensor(entry["step"])]


@pytest.mark.parametrize("spoiled", [{}, {3: math.nan}, {2: math.inf, 3: math.nan}, {1: math.nan}, {_STEPS: math.inf}])
def test_both_decide_alike(spoiled: dict[int, float]) -> None:
    trainings = [_make(on_device=on_device, spoiled=spoiled, save_every=2) for on_device in (False, True)]
    for one in trainings:
        assert not one.loop.run()
    host, device = trainings
    assert host.numbers == device.numbers
    assert [event.step for event in device.reporter.steps] == list(range(1, _STEPS + 1))
    assert [event.skipped for event in device.reporter.steps] == [step + 1 in spoiled for step in range(_STEPS)]
    assert all(torch.equal(*pair) for pair in zip(_state(host), _state(device), strict=True))
    assert host.checkpoints.saved.keys() == device.checkpoints.saved.keys() == {2, 4, 6}
    for step, weights in host.checkpoints.saved.items():
        assert torch.equal(weights, device.checkpoints.saved[step])
    assert _words(host) == _words(device)


def _words(training: _Training) -> list[str]:
    return [one if isinstance(one, str) else f"step {one.step}" for one in training.reporter.said]


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_stop_makes_later_steps_do_nothing(fault: float) -> None:
    """The step that was handed out before the bad one's numbers were read leaves everything as it was."""
    training = _make(on_device=True, policy="stop", spoiled={4: fault})
    before = _make(on_device=False, policy="stop", spoiled={4: fault})
    for one in (before, training):
        with pytest.raises(RunFailure) as caught:
            one.loop.run()
        assert caught.value.failure.message.startswith(f"the {'loss' if math.isnan(fault) else 'gradient'} of step 4")
    assert before.objective.num_passes == 4
    assert training.objective.num_passes == 5
    assert _words(training) == _words(before) == ["step 1", "step 2", "step 3", "step 4", "non-finite-loss"]
    assert training.numbers == before.numbers
    assert all(torch.equal(*pair) for pair in zip(_state(before), _state(training), strict=True))
    assert training.loop.progress.steps_done == 3


def test_first_step_is_told_before_the_second_begins() -> None:
    training = _make(on_device=True)
    told: list[int] = []
    forward = training.objective.forward

    def watched(model: Any, batch: MicroBatch) -> Outcome:
        told.append(len(training.reporter.steps))
        return forward(model, batch)

    training.objective.forward = watched  # type: ignore[method-assign]
    training.loop.run()
    assert told[:2] == [0, 1]
    # One may be on its way.
    assert all(step - 1 <= count <= step for step, count in enumerate(told) if step > 1)


def test_a_step_is_told_at_its_end_while_the_next_one_is_still_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    training = _make(on_device=True)
    emit, told = training.reporter.emit, {step: threading.Event() for step in range(1, _STEPS + 1)}
    forward, waited = training.objective.forward, []

    def noted(message: Any) -> None:
        emit(message)
        if isinstance(message, event_pb2.StepEvent):
            told[message.step].set()

    def holding(model: Any, batch: MicroBatch) -> Outcome:
        # In the midst of a step; the passes before it are those of the steps before it.
        if training.objective.num_passes:
            waited.append(told[training.objective.num_passes].wait(60))
        return forward(model, batch)

    monkeypatch.setattr(training.reporter, "emit", noted)
    training.objective.forward = holding  # type: ignore[method-assign]
    training.loop.run()
    assert waited == [True] * (_STEPS - 1)
    assert _words(training) == [f"step {number + 1}" for number in range(_STEPS)]


def test_steps_are_waited_for_with_their_own_device_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other would get a context of this process."""
    training, device, made = _make(on_device=True), torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda one: made.append((one, threading.current_thread().name)))
    teller = StepTeller(data=training.loop.data, reporter=training.loop.reporter, halts=True, background_on=device)
    numbers = StepNumbers(rows=[], norm=1.0, is_finite=True, updated=True, seconds=1.0)
    issued = IssuedStep(
        step=0, batches=[], weights=[], learning_rate=0.1, peak_memory_bytes=0,
        read=lambda: replace(numbers, norm=float(len(made))),
    )  # fmt: skip
    told = teller.hand_over(issued)()
    teller.close()
    assert told.numbers.norm == 1.0
    ((one, name),) = made
    assert one == device
    assert name != threading.current_thread().name


@pytest.mark.parametrize("step", [1, 3])
def test_nothing_is_told_behind_what_could_not_be(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    training = _make(on_device=True)
    emit = training.reporter.emit

    def failing(message: Any) -> None:
        if getattr(message, "step", 0) == step:
            raise OSError("for a test")
        emit(message)

    monkeypatch.setattr(training.reporter, "emit", failing)
    with pytest.raises(OSError, match="for a test"):
        training.loop.run()
    assert _words(training) == [f"step {number + 1}" for number in range(step - 1)]


def test_a_stop_waits_for_what_is_in_hand() -> None:
    training = _make(on_device=True)
    forward = training.objective.forward

    def stopping(model: Any, batch: MicroBatch) -> Outcome:
        if training.objective.num_passes == 3:
            training.switch.request(StopMode.CHECKPOINT)
        return forward(model, batch)

    training.objective.forward = stopping  # type: ignore[method-assign]
    with pytest.raises(StopRequested):
        training.loop.run()
    assert _words(training) == ["step 1", "step 2", "step 3", "step 4", "STOPPING"]
    assert list(training.checkpoints.saved) == [4]
    assert torch.equal(training.checkpoints.saved[4], training.model.adapter.detach())


def test_smaller_passes_are_told_after_the_steps_before(monkeypatch: pytest.MonkeyPatch) -> None:
    training = _make(on_device=True)
    whole = _make(on_device=False)
    failed: list[int] = []
    collate = batches.collate

    def collating(data: Any, references: Any) -> MicroBatch:
        if training.objective.num_passes == 2 and not failed:
            failed.append(len(references))
            raise torch.OutOfMemoryError("for a test")
        return collate(data, references)

    whole.loop.run()
    monkeypatch.setattr(loop_module, "collate", collating)
    training.loop.run()
    assert failed == [2]
    said = [type(one).__name__ for one in training.reporter.said]
    assert said == ["StepEvent"] * 2 + ["MicroBatchReducedEvent"] + ["StepEvent"] * 4
    for ours, theirs in zip(training.reporter.steps, whole.reporter.steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)


def test_a_stop_where_nothing_can_be_said_saves_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: each event waits for room, and a stop ends that."""
    training = _make(on_device=True)
    emit = training.reporter.emit

    def emit_until_full(message: Any) -> None:
        if getattr(message, "step", 0) >= 3:
            training.switch.request(StopMode.CHECKPOINT)
            training.switch.check()
        emit(message)

    monkeypatch.setattr(training.reporter, "emit", emit_until_full)
    with pytest.raises(StopRequested):
        training.loop.run()
    assert _words(training) == ["step 1", "step 2", "STOPPING"]
    # The stop comes when the third is told, while the fourth may be on its way.
    (saved,) = training.checkpoints.saved
    assert saved == training.loop.progress.steps_done
    assert saved in (3, 4)
    assert torch.equal(training.checkpoints.saved[saved], training.model.adapter.detach())


@pytest.mark.parametrize("spoiled", [{}, {2: math.nan}])
def test_a_step_that_finds_no_memory_is_told_after_the_steps_before(
    spoiled: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = _make(on_device=True, policy="stop", spoiled=spoiled)
    collate = batches.collate

    def collating(data: Any, references: Any) -> MicroBatch:
        if training.objective.num_passes == 2:
            raise torch.OutOfMemoryError("for a test")
        return collate(data, references)

    monkeypatch.setattr(loop_module, "collate", collating)
    monkeypatch.setattr(PassSize, "_halve", lambda *arguments: None)
    with pytest.raises(RunFailure if spoiled else torch.OutOfMemoryError):
        training.loop.run()
    assert _words(training) == ["step 1", "step 2", *(["non-finite-loss"] if spoiled else [])]


def test_an_update_that_finds_no_memory_is_told_after_the_steps_before(monkeypatch: pytest.MonkeyPatch) -> None:
    training = _make(on_device=True)
    apply, calls = UpdatesOnDevice.apply, []

    def applying(self: UpdatesOnDevice, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("for a test")
        return apply(self, *arguments)

    monkeypatch.setattr(UpdatesOnDevice, "apply", applying)
    with pytest.raises(torch.OutOfMemoryError):
        training.loop.run()
    assert _words(training) == ["step 1", "step 2"]


def test_a_step_without_weight_is_left_out() -> None:
    model = make_fast(make_peft())
    optimizer = FlatAdamW(model.flat_adapter, _SETTINGS)
    before = model.adapter.detach().clone()
    for updates in (
        UpdatesOnHost(optimizer=optimizer, scaler=None),
        UpdatesOnDevice(optimizer=optimizer, inner=optimizer, device=_CPU, halts=False),
    ):
        model.adapter.grad = torch.ones_like(model.adapter)
        updates.begin()
        found = updates.apply([torch.zeros(1, 1, dtype=torch.float64)], torch.ones(()), 0)()
        assert (found.is_finite, found.updated, found.rows, found.norm) == (False, False, [[0.0]], 1.0)
        assert torch.equal(model.adapter.detach(), before)
        assert model.adapter.grad is None


def test_saved_state_is_without_the_flag() -> None:
    training = _make(on_device=True)
    training.loop.run()
    saved = copy.deepcopy(training.optimizer.state_dict())
    assert set(saved) == {"state", "param_groups"}
    again = _make(on_device=False)
    again.optimizer.load_state_dict(saved)
    rows = PlannedRows(make_examples([9], vocabulary_size=VOCABULARY_SIZE, seed=1))
    assert torch.isfinite(nats(again.model, rows)).all()
