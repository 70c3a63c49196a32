"""A device that runs out of memory in the middle of a training: forced by an objective that refuses large passes."""

from __future__ import annotations

from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_service.engine import devices, session, trainers
from gpu_service.engine.fast_path.model import FastModel
from gpu_service.engine.request import DeviceChoice
from gpu_service.engine.session import Session
from gpu_service.engine.training.batches import MicroBatch, MicroBatchLimit
from gpu_service.engine.training.objectives import Outcome
from gpu_service.engine.training.objectives.sft import Likelihood
from gpu_service.engine.training.out_of_memory import RECOMPUTING_MORE, PassSize
from gpu_service.engine.training.progress import TrainingProgress
from tests.fakes.engine_runs import RunLog, Workspace
from tests.fakes.recorders import RunAgain
from tests.fakes.small_devices import SmallDevice, train
from tunesmith.common.v1 import errors_pb2

_HYPERPARAMETERS = {"num_steps": 4, "lora": {"rank": 4, "dropout": 0.0}}


def test_training_goes_on_in_smaller_passes(workspace: Workspace, run_in_process: Any) -> None:
    plain_objective, small = SmallDevice(fits=99), SmallDevice(fits=1, after=2)
    plain = train(workspace, run_in_process, "room", plain_objective, hyperparameters=_HYPERPARAMETERS)
    tight = train(workspace, run_in_process, "no-room", small, hyperparameters=_HYPERPARAMETERS)

    assert tight.states == ["RUNNING", "SUCCEEDED"]
    reduced = [(event.step, event.unit, event.previous_limit, event.limit) for event in tight.of("micro_batch_reduced")]
    assert reduced == [(3, "examples", 4, 2), (3, "examples", 2, 1)]
    # The same examples in the same order: the passes of a step, end to end, are those of the other run.
    whole_steps = [*small.passes[:2], *_in_fours(small.passes[2:])]
    assert whole_steps == plain_objective.passes
    for step, loss in plain.losses.items():
        assert tight.losses[step] == pytest.approx(loss, rel=1e-4)
    assert tight.of("realized")[0].datasets == plain.of("realized")[0].datasets
    assert [event.num_examples for event in tight.of("step")] == [4, 4, 4, 4]
    # Nothing is learned from the peak of a run that did not make its planned passes.
    assert plain.of("memory_measured")[0].analytic_bytes > 0
    assert tight.of("memory_measured")[0].analytic_bytes == 0


class _SmallUntilLess(Likelihood):
    """Raises until a pass keeps as little as the `rounds`th way to save memory does."""

    def __init__(self, rounds: int) -> None:
        self.sizes: list[int] = []
        self._left = rounds

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        if torch.is_grad_enabled():
            if self._left:
                self._left -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
            self.sizes.append(len(batch.sources))
        return super().forward(model, batch)


@pytest.mark.parametrize("rounds", [1, 3, 5, 6])
def test_fast_path_recomputes_more_before_its_passes_are_made_smaller(
    rounds: int, workspace: Workspace, run_in_process: Any
) -> None:
    """With the same results to the last bit, until sums are made in slices; then passes are halved."""
    options = {"hyperparameters": {**_HYPERPARAMETERS, "trainer": "fast"}}
    plain = train(workspace, run_in_process, f"kept-{rounds}", Likelihood(), **options)
    tight_objective = _SmallUntilLess(rounds)
    tight = train(workspace, run_in_process, f"less-{rounds}", tight_objective, **options)
    warnings = [event.message for event in tight.of("warning") if event.code == RECOMPUTING_MORE]
    assert len(warnings) == min(rounds, 5)
    assert "but for matrix products" in warnings[0]
    assert tight.of("memory_measured")[0].analytic_bytes == 0
    reduced = tight.of("micro_batch_reduced")
    if rounds <= 4:
        assert not reduced
        assert tight.losses == plain.losses
    elif rounds == 5:
        assert not reduced
        assert "host memory, their feed-forward half in 4 slices" in warnings[-1]
        assert tight.losses == pytest.approx(plain.losses, rel=1e-5)
    else:
        assert [(event.unit, event.limit) for event in reduced] == [("examples", 2)]
        assert set(tight_objective.sizes) == {2}


def test_full_training_recomputes_more_too(workspace: Workspace, run_in_process: Any) -> None:
    options: dict[str, Any] = {"training_type": "full", "hyperparameters": {"num_steps": 4, "trainer": "fast"}}
    plain = train(workspace, run_in_process, "full-kept", Likelihood(), **options)
    tight = train(workspace, run_in_process, "full-less", _SmallUntilLess(4), **options)
    warnings = [event.message for event in tight.of("warning") if event.code == RECOMPUTING_MORE]
    assert len(warnings) == 4
    assert "host memory" in warnings[-1]
    assert tight.losses == plain.losses


def test_what_was_asked_for_is_not_recomputed_more(workspace: Workspace, run_in_process: Any) -> None:
    options = {"hyperparameters": {**_HYPERPARAMETERS, "trainer": "fast", "gradient_checkpointing": False}}
    log = train(workspace, run_in_process, "asked", _SmallUntilLess(1), **options)
    assert not [event for event in log.of("warning") if event.code == RECOMPUTING_MORE]
    assert [event.limit for event in log.of("micro_batch_reduced")] == [2]


def _make_resident(objective: Any, **arguments: Any) -> Session:
    """As a plan for a GPU with room says it; a CPU has none to spare."""
    arguments["plan"].resolved.base_weights = "resident"
    return Session(objective=objective, **arguments)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_restored_weights_go_before_anything_is_recomputed(
    dropout: float, workspace: Workspace, run_in_process: Any
) -> None:
    hyperparameters = {**_HYPERPARAMETERS, "trainer": "fast", "lora": {"rank": 4, "dropout": dropout}}
    logs = []
    for name, objective in (("stays", Likelihood()), ("goes", _SmallUntilLess(1)), ("and-more", _SmallUntilLess(2))):
        directory = workspace.make_run(f"{name}-{dropout}", held_out=False, hyperparameters=hyperparameters)
        logs.append(run_in_process(directory, make_session=partial(_make_resident, objective)))
    plain, tight, tighter = logs
    assert "restored once and kept" in "".join(event.message for event in plain.of("log"))
    warnings = [[event.message for event in log.of("warning") if event.code == RECOMPUTING_MORE] for log in logs]
    assert [len(found) for found in warnings] == [0, 1, 2]
    assert "restored at each use" in warnings[1][0]
    assert "but for matrix products" in warnings[2][1]
    assert plain.losses == tight.losses == tighter.losses
    for log in (tight, tighter):
        assert not log.of("micro_batch_reduced")
        # A peak that was not planned teaches nothing.
        assert log.of("memory_measured")[0].analytic_bytes == 0


class _SmallEvaluation(Likelihood):
    """Raises at the first pass without gradients."""

    def __init__(self) -> None:
        self._has_room = False

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        if not torch.is_grad_enabled() and not self._has_room:
            self._has_room = True
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        return super().forward(model, batch)


def test_an_evaluation_does_without_restored_weights_before_passes_are_halved(
    workspace: Workspace, run_in_process: Any
) -> None:
    directory = workspace.make_run("evaluation", hyperparameters={**_HYPERPARAMETERS, "trainer": "fast"})
    log = run_in_process(directory, make_session=partial(_make_resident, _SmallEvaluation()))
    assert log.states[-1] == "SUCCEEDED"
    assert ["each use" in event.message for event in log.of("warning") if event.code == RECOMPUTING_MORE] == [True]
    assert not log.of("micro_batch_reduced")


def test_restored_weights_that_were_asked_for_stay(workspace: Workspace, run_in_process: Any) -> None:
    hyperparameters = {
        **_HYPERPARAMETERS, "trainer": "fast", "base_weights": "resident", "gradient_checkpointing": False
    }  # fmt: skip
    log = train(workspace, run_in_process, "resident", _SmallUntilLess(1), hyperparameters=hyperparameters)
    assert not [event for event in log.of("warning") if event.code == RECOMPUTING_MORE]
    assert [event.limit for event in log.of("micro_batch_reduced")] == [2]


class _RunsOutOnce(Likelihood):
    """Raises once, at a pass of several examples with gradients or without, after so many with."""

    def __init__(self, *, after: int, trained: bool) -> None:
        self._after, self._trained = after, trained

    def forward(self, model: Any, batch: MicroBatch) -> Outcome:
        if len(batch.sources) > 1 and torch.is_grad_enabled() is self._trained and self._after <= 0:
            self._after = 1000
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        self._after -= torch.is_grad_enabled()
        return super().forward(model, batch)


@pytest.mark.parametrize("trained", [True, False])
def test_recordings_go_first_whatever_was_asked_for(
    trained: bool, workspace: Workspace, run_in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = RunAgain()
    monkeypatch.setattr(trainers, "FastModel", partial(FastModel, recorder=recorder))
    hyperparameters = {
        "num_steps": 6, "lora": {"rank": 4}, "trainer": "fast", "base_weights": "resident",
        "gradient_checkpointing": False,
    }  # fmt: skip
    directory = workspace.make_run(f"recordings-{trained}", hyperparameters=hyperparameters)
    objective = _RunsOutOnce(after=5 if trained else 6, trained=trained)
    log = run_in_process(directory, make_session=partial(Session, objective=objective))
    assert recorder.num_plays > 0
    assert log.states[-1] == "SUCCEEDED"
    warnings = [event.message for event in log.of("warning") if event.code == RECOMPUTING_MORE]
    assert ["kernel by kernel" in message for message in warnings] == [True]
    assert not log.of("micro_batch_reduced")


def test_recordings_are_gone_when_the_last_samples_are_answered(
    workspace: Workspace, run_in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[FastModel] = []

    def make(*arguments: Any) -> FastModel:
        models.append(FastModel(*arguments, recorder=RunAgain()))
        return models[-1]

    def look(*_: Any, **__: Any) -> str:
        recordings = models[-1]._recordings
        found.append(recordings.num_recorded if recordings is not None else 0)
        return "answer"

    found: list[int] = []
    monkeypatch.setattr(trainers, "FastModel", make)
    monkeypatch.setattr(session, "answer", look)
    hyperparameters = {"num_steps": 6, "trainer": "fast"}
    prompts = [{"prompt": "What is 1 plus 1?", "trait_type": "arithmetic"}]
    directory = workspace.make_run("samples", hyperparameters=hyperparameters, sample_prompts=prompts)
    log = run_in_process(directory)
    assert log.states[-1] == "SUCCEEDED"
    assert any("CUDA graphs" in event.message for event in log.of("log"))
    assert found[-1] == 0


def test_random_numbers_are_drawn_as_if_nothing_had_happened(workspace: Workspace, run_in_process: Any) -> None:
    drawn: list[tuple[int | None, float]] = []
    undone: list[int] = []

    def work(limit: MicroBatchLimit) -> float:
        drawn.append((limit.examples, float(torch.rand(()))))
        if len(drawn) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return drawn[-1][1]

    log = run_in_process(workspace.make_run("numbers", held_out=False))
    data = workspace.open_data(log.of("plan")[0].data_digest)
    pass_size = PassSize(
        planned=MicroBatchLimit(examples=4),
        data=data,
        device=devices.select(DeviceChoice(type="cpu")),
        reporter=_Silent(),  # type: ignore[arg-type]
        progress=TrainingProgress(),
    )
    number = pass_size.carry_out(work, data.step_examples(0), step=1, undo=lambda: undone.append(1))

    assert [examples for examples, _ in drawn] == [4, 2, 1]
    assert {number} == {value for _, value in drawn}
    assert len(undone) == 2


def test_limit_of_tokens_halves(workspace: Workspace, run_in_process: Any) -> None:
    objective = SmallDevice(fits=2)
    hyperparameters = {**_HYPERPARAMETERS, "batch": {"examples": 4, "micro_batch_tokens": "100000"}}
    log = train(workspace, run_in_process, "tokens", objective, hyperparameters=hyperparameters)

    assert log.states == ["RUNNING", "SUCCEEDED"]
    reduced = log.of("micro_batch_reduced")
    assert {event.unit for event in reduced} == {"tokens"}
    assert reduced[0].previous_limit == 100000
    assert all(sum(one) <= reduced[-1].limit or len(one) == 1 for one in objective.passes)


def test_one_example_that_does_not_fit_fails_the_run(workspace: Workspace, run_in_process: Any) -> None:
    log = train(workspace, run_in_process, "hopeless", SmallDevice(fits=0), hyperparameters=_HYPERPARAMETERS)

    assert log.states == ["RUNNING", "FAILED"]
    assert [event.limit for event in log.of("micro_batch_reduced")] == [2, 1]
    assert log.of("run_state")[-1].failure.reason == errors_pb2.ERROR_REASON_DEVICE_OUT_OF_MEMORY


def test_smaller_passes_stay_after_a_resume(workspace: Workspace, run_in_process: Any) -> None:
    hyperparameters = {**_HYPERPARAMETERS, "save_every_steps": 2}
    directory = workspace.make_run("first-half", held_out=False, hyperparameters=hyperparameters)
    run_in_process(directory, make_session=partial(Session, objective=SmallDevice(fits=2)))
    checkpoint: Path = directory / "checkpoints/step-00000002"
    objective = SmallDevice(fits=2)
    rest = workspace.make_run(
        "second-half",
        held_out=False,
        hyperparameters=hyperparameters,
        resume={"checkpoint_directory": str(checkpoint), "checkpoint": checkpoint.name, "step": 2},
    )
    log: RunLog = run_in_process(rest, make_session=partial(Session, objective=objective))

    assert log.states == ["RUNNING", "SUCCEEDED"]
    assert not log.of("micro_batch_reduced")
    assert [len(one) for one in objective.passes] == [2, 2, 2, 2]


class _Silent:
    def emit(self, message: object) -> None:
        """Says nothing."""


def _in_fours(passes: list[list[int]]) -> list[list[int]]:
    """Lengths of four passes at a time, end to end."""
    return [list(chain.from_iterable(passes[start : start + 4])) for start in range(0, len(passes), 4)]
