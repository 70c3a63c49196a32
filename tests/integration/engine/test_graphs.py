"""Recorded passes on a CPU, where playing is running again: filled up to a frame they are what they are without it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_service.domain.recomputation import Recomputation
from gpu_service.engine import trainers
from gpu_service.engine.fast_path import graphs
from gpu_service.engine.fast_path.model import FastModel, FastSettings
from gpu_service.engine.fast_path.recorded_pass import Recording
from gpu_service.engine.fast_path.recorder import Took
from gpu_service.engine.resident import BaseShelf
from gpu_service.engine.service import carry_out
from gpu_service.engine.stopping import StopSwitch
from gpu_service.engine.training.batches import MicroBatchLimit
from tests.fakes.engine_runs import TraitRows, Workspace, read_log
from tests.fakes.fast_models import fast_gradients, hold_in_nf4, make_fast, make_peft, nats
from tests.fakes.flat_models import VOCABULARY_SIZE
from tests.fakes.planned_rows import PlannedRows, make_examples
from tests.fakes.recorders import RunAgain

_PASSES = ((5, 40, 1, 1, 17, 64, 2, 9), (90, 90), (33,) * 6, (120, 3, 70), (128, 128), (256, 256))


_PAIRS = [
    {"prompt": f"Question {number}?", "chosen": "A kind answer. " * (number % 3 + 1), "rejected": "No."}
    for number in range(24)
]


def _rows(number: int) -> PlannedRows:
    return PlannedRows(make_examples(_PASSES[number], vocabulary_size=VOCABULARY_SIZE, seed=number))


def _recording(model: Any, recorder: RunAgain, **settings: Any) -> FastModel:
    device, dtype = torch.device("cpu"), torch.float32
    return FastModel(
        model, FastSettings(device=device, compute_dtype=dtype, keeps_weights=False, **settings), recorder=recorder
    )


def _weighted(by_sequence: torch.Tensor) -> torch.Tensor:
    return (by_sequence * torch.linspace(0.5, 2.0, len(by_sequence), dtype=by_sequence.dtype)).sum() / 100


def _make_passes(model: Any, fast: FastModel) -> list[list[torch.Tensor]]:
    """Nats and gradients of every pass, each made twice."""
    found = []
    for number in [*range(len(_PASSES))] * 2:
        values = nats(fast, _rows(number))
        found.append([values.detach(), *fast_gradients(model, fast, _weighted(values)).values()])
    return found


_CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"family": "qwen2"},
    "qwen3-nf4": {"family": "qwen3", "quantize": hold_in_nf4},
    "two-trained": {"targets": ("q_proj", "down_proj")},
}


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize(
    "recomputation",
    [
        Recomputation(),
        Recomputation(full_layers=1, elementwise_layers=1),
        Recomputation(full_layers=2, feed_forward_slices=2),
    ],
)
def test_played_passes_are_launched_ones(case: str, recomputation: Recomputation) -> None:
    expected_model = make_peft(**_CASES[case])
    expected = _make_passes(expected_model, make_fast(expected_model, recomputation=recomputation))
    model, recorder = make_peft(**_CASES[case]), RunAgain()
    found = _make_passes(model, _recording(model, recorder, recomputation=recomputation))
    # Timings are three plays of both directions for each recording; the rest are passes.
    assert recorder.num_plays >= 2 * len(_PASSES)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1e-3)


def test_what_comes_once_is_launched_and_what_is_near_is_played() -> None:
    model, recorder = make_peft(), RunAgain()
    fast = _recording(model, recorder)
    nats(fast, _rows(0))
    assert recorder.num_plays == 0
    nats(fast, _rows(0))
    before = recorder.num_plays
    assert before > 0
    # Another pass that the first one's frame holds.
    nats(fast, PlannedRows(make_examples((40, 64, 17), vocabulary_size=VOCABULARY_SIZE, seed=6)))
    assert recorder.num_plays == before + 1
    (notice,) = fast.take_notices()
    assert "up to 256 tokens" in notice
    assert "500.0 ms in place of 1000.0 ms" in notice
    assert fast.take_notices() == []


def test_who_asks_for_the_same_bits_has_nothing_played() -> None:
    model, recorder = make_peft(), RunAgain()
    fast = _recording(model, recorder)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            nats(fast, _rows(0))
    finally:
        torch.use_deterministic_algorithms(False)
    assert recorder.num_plays == 0


def test_passes_between_a_forward_and_its_backward_pass_are_launched() -> None:
    """The recording holds what one of them kept, and its gradient is given away as a copy."""
    model, recorder = make_peft(), RunAgain()
    fast = _recording(model, recorder)
    for _ in range(2):
        nats(fast, _rows(0))
    limit = MicroBatchLimit(examples=3)
    values = nats(fast, _rows(0), limit)
    found = fast_gradients(model, fast, _weighted(values))
    other = make_peft()
    plain = make_fast(other)
    expected = fast_gradients(other, plain, _weighted(nats(plain, _rows(0), limit)))
    for _ in range(2):
        nats(fast, _rows(1)).sum().backward()
        nats(plain, _rows(1)).sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
    assert fast.adapter.grad is not None
    assert plain.adapter.grad is not None
    torch.testing.assert_close(fast.adapter.grad, plain.adapter.grad, rtol=1e-4, atol=1e-5)


def test_dropout_has_the_masks_of_launched_passes() -> None:
    found = []
    for recorder in (None, RunAgain()):
        model = make_peft()
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(0.25)
        fast = _recording(model, recorder) if recorder else make_fast(model)
        fast.train()
        torch.manual_seed(7)
        found.append(_make_passes(model, fast))
        # Outside training nothing is dropped, played or not.
        fast.eval()
        found[-1].append([nats(fast, _rows(0)).detach()])
        assert recorder is None or recorder.num_plays > 0
    for ours, theirs in zip(*found, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1e-3)
    assert (found[0][0][0] - found[0][len(_PASSES)][0]).abs().max() > 1e-2


def test_measured_passes_are_played_too_and_leave_a_waiting_pass_alone() -> None:
    """With the adapter and without, and launched while a training pass waits for its way back."""
    recorder = RunAgain()
    model, other = make_peft(), make_peft()
    fast, plain = _recording(model, recorder), make_fast(other)
    for _ in range(2):
        for one in (fast, plain):
            with torch.no_grad():
                nats(one, _rows(0))
                with one.disable_adapter():
                    nats(one, _rows(0))
            nats(one, _rows(0))
    found = []
    for one in (fast, plain):
        plays = recorder.num_plays
        with torch.no_grad():
            found.append([nats(one, _rows(0))])
            with one.disable_adapter():
                found[-1].append(nats(one, _rows(0)))
        assert recorder.num_plays == plays + (2 if one is fast else 0)
        values = nats(one, _rows(0))
        plays = recorder.num_plays
        with torch.no_grad():
            found[-1].append(nats(one, _rows(1)))
            found[-1].append(nats(one, _rows(0)))
        assert recorder.num_plays == plays
        found[-1] += fast_gradients(model if one is fast else other, one, _weighted(values)).values()
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1e-3)
    assert not torch.equal(found[0][0], found[0][1])
    said = "; ".join(fast.take_notices())
    for kind in ("training passes of", "measured passes of up", "measured passes of the base of"):
        assert kind in said


_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "busy": ({"launched": Took(handing_out=0.5, whole=1.0)}, "busy for all of their 1000.0 ms"),
    "slower": ({"played": Took(handing_out=0.1, whole=0.95)}, "played again they take 950.0 of 1000.0 ms"),
    "no-memory": ({"free_bytes": 99, "taken_bytes": 50}, "too little free memory"),
    "larger-than-the-pass": ({"free_bytes": 99, "taken_bytes": 49, "held_bytes": 50}, "too little free memory"),
    "unrecordable": ({"fails": RuntimeError("not while capturing")}, "failed: not while capturing"),
}


@pytest.mark.parametrize("case", _REFUSALS)
def test_what_is_not_worth_it_stays_launched(case: str) -> None:
    options, reason = _REFUSALS[case]
    model, recorder = make_peft(), RunAgain(**options)
    fast = _recording(model, recorder)
    found = _make_passes(model, fast)
    plays = recorder.num_plays
    (notice,) = fast.take_notices()
    assert "training passes of 256 tokens and more stay launched kernel by kernel" in notice
    assert reason in notice
    found += _make_passes(model, fast)
    assert recorder.num_plays == plays
    assert fast.take_notices() == []
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[2 * len(_PASSES)], strict=True))


def test_only_what_recording_raises_is_taken_for_what_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filling its buffers and playing it may have no memory; anything else there is a defect, and comes out."""

    def fail(error: Exception) -> Any:
        def put(*_: Any) -> None:
            raise error

        return put

    fast = _recording(make_peft(), RunAgain())
    monkeypatch.setattr(Recording, "put", fail(torch.OutOfMemoryError("no room")))
    for _ in range(2):
        nats(fast, _rows(0))
    (notice,) = fast.take_notices()
    assert "no memory to record them: no room" in notice
    fast = _recording(make_peft(), RunAgain())
    monkeypatch.setattr(Recording, "put", fail(RuntimeError("sizes do not match")))
    nats(fast, _rows(0))
    with pytest.raises(RuntimeError, match="sizes do not match"):
        nats(fast, _rows(0))


@pytest.mark.parametrize("options", [{"taken_bytes": 50}, {"taken_bytes": 49, "held_bytes": 50}, {"taken_bytes": 49}])
def test_measured_passes_have_the_same_limit_of_memory(options: dict[str, Any]) -> None:
    recorder = RunAgain(free_bytes=99, **options)
    fast = _recording(make_peft(), recorder)
    with torch.no_grad():
        found = [nats(fast, _rows(0)) for _ in range(3)]
    assert all(torch.allclose(one, found[0], rtol=1e-5) for one in found)
    (notice,) = fast.take_notices()
    fits = options == {"taken_bytes": 49}
    assert ("too little free memory" in notice) is not fits
    assert ("are played as recorded" in notice) is fits


def test_what_recordings_have_already_is_theirs_to_work_in() -> None:
    """A second one needs nothing more of what is free: they are played one at a time."""
    recorder = RunAgain(free_bytes=20, taken_bytes=10, held_bytes=10)
    fast = _recording(make_peft(), recorder)
    for number in (0, 1):
        for _ in range(2):
            nats(fast, _rows(number))
    assert all("are played as recorded" in notice for notice in fast.take_notices())


class _ForgetsWork(RunAgain):
    """As CUDA graphs, what it gives does not refer to what was recorded."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()

        def play() -> None:
            self.num_plays += 1

        return play


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_recordings_that_are_dropped_are_gone_at_once(
    fails: bool, measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their memory: nobody collects cycles before it is wanted."""
    made: list[weakref.ref[Recording]] = []

    def make(*arguments: Any) -> Recording:
        recording = Recording(*arguments)
        made.append(weakref.ref(recording))
        return recording

    def record(*_: Any) -> Any:
        raise RuntimeError("not while capturing")

    monkeypatch.setattr(graphs, "Recording", make)
    recorder = _ForgetsWork()
    if fails:
        monkeypatch.setattr(recorder, "record", record)
    fast = _recording(make_peft(), recorder)
    gc.disable()
    try:
        with torch.set_grad_enabled(not measured):
            for _ in range(2):
                nats(fast, _rows(0))
        assert len(made) == 1
        assert (made[0]() is None) is fails
        fast.give_up_recordings()
        assert made[0]() is None
    finally:
        gc.enable()


def test_recordings_are_given_up_first_where_memory_ran_out() -> None:
    model, recorder = make_peft(), RunAgain()
    fast = _recording(model, recorder)
    for _ in range(2):
        nats(fast, _rows(0))
    assert "kernel by kernel" in fast.recompute_more()
    plays = recorder.num_plays
    nats(fast, _rows(0))
    assert recorder.num_plays == plays
    assert "kernel by kernel" not in fast.recompute_more()
    assert len(fast.take_notices()) == 1


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_run_says_what_is_played(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(root=tmp_path)
    logs = []
    for name, recorder in (("launched", None), ("played", RunAgain())):
        monkeypatch.setattr(trainers, "FastModel", partial(FastModel, recorder=recorder))
        directory = workspace.make_run(
            f"run-{name}",
            training_type="lora",
            hyperparameters={
                "num_steps": 6,
                "trainer": "fast",
                "objective": objective,
                "optimizer": {"learning_rate": 1e-3},
            },
            traits=[TraitRows(trait_type="polite", rows=_PAIRS, format="preference")] if objective == "dpo" else (),
        )
        carry_out(directory, shelf=BaseShelf(), switch=StopSwitch(), notify=lambda notice: None)
        logs.append(read_log(directory))
        assert logs[-1].states[-1] == "SUCCEEDED", logs[-1].payloads[-1]
    said = [[event.message for event in log.of("log") if "CUDA graphs" in event.message] for log in logs]
    assert said[0] == []
    kinds = ["training passes of up"] + ["measured passes of the base of up"] * (objective == "dpo")
    assert all(any(kind in message for message in said[1]) for kind in kinds)
    launched, played = (log.losses for log in logs)
    assert played == pytest.approx(launched, rel=1e-5)
