"""A base that one run left, taken over by another kind of model: held once, told at its size, and read anew if not."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from gpu_service.engine import libraries
from gpu_service.engine.lean import promotion
from gpu_service.engine.lean.model import LeanCausal
from gpu_service.engine.loading import weights
from gpu_service.engine.loading.places import NotTensorForTensor
from gpu_service.engine.resident import BaseShelf, held_bytes
from gpu_service.engine.session import Session
from tests.fakes.engine_runs import RunLog, Workspace
from tests.fakes.generations import InProcessEngine
from tests.fakes.tiny_models import TinyOptions
from tests.integration.engine.conftest import RunInProcess

pytestmark = pytest.mark.timeout(240)

_HYPERPARAMETERS = {
    "trainer": "fast", "num_steps": 2, "quantization": {"method": "nf4", "double_quantization": True}
}  # fmt: skip
# What answers it is the library's model.
_PROMPTS = [{"trait_type": "coding", "prompt": "def add_1("}]


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Before any run: a library logs an exception of its import, and pytest keeps it, with the frames that it is in."""
    libraries.need()


def _leave_lean_base(workspace: Workspace, run_in_process: RunInProcess, name: str, **options: Any) -> BaseShelf:
    shelf = BaseShelf()
    log = run_in_process(workspace.make_run(name, hyperparameters=_HYPERPARAMETERS, **options), shelf=shelf)
    assert log.states[-1] == "SUCCEEDED"
    assert isinstance(_base_on(shelf), LeanCausal)
    return shelf


def _base_on(shelf: BaseShelf) -> Any:
    assert shelf._base is not None
    return shelf._base.model


def _is_gone(reference: weakref.ref[Any]) -> bool:
    gc.collect()
    return reference() is None


def _sample(workspace: Workspace, run_in_process: RunInProcess, name: str, **options: Any) -> RunLog:
    directory = workspace.make_run(name, hyperparameters=_HYPERPARAMETERS, sample_prompts=_PROMPTS)
    return run_in_process(directory, **options)


def test_a_run_holds_the_base_that_it_took_over_once(workspace: Workspace, run_in_process: RunInProcess) -> None:
    shelf = _leave_lean_base(workspace, run_in_process, "before")
    lean = weakref.ref(_base_on(shelf))
    gone: list[bool] = []

    def make_session(**options: Any) -> Session:
        gone.append(_is_gone(lean))
        return Session(**options)

    log = _sample(workspace, run_in_process, "after", shelf=shelf, make_session=make_session)
    assert log.states[-1] == "SUCCEEDED"
    assert log.stage_details("WEIGHTS") == {"resident": "true"}
    assert gone == [True]
    assert shelf.describe()["bytes"] == held_bytes(_base_on(shelf))


def test_an_answer_holds_it_once_and_tells_its_size(workspace: Workspace, run_in_process: RunInProcess) -> None:
    model = workspace.place_model(TinyOptions())
    engine = InProcessEngine(workspace)
    engine.shelf = _leave_lean_base(workspace, run_in_process, "before-answer", base_model=model)
    lean, size = weakref.ref(_base_on(engine.shelf)), engine.shelf.describe()["bytes"]
    gone: list[bool] = []
    answered = engine.ask(
        "What is two plus two?",
        model=model,
        quantization="nf4",
        on_notice=lambda notice, switch: gone.append(_is_gone(lean)),
    )
    assert answered.last["statistics"]["warm"] is True
    assert gone
    assert all(gone)
    # What is not quantized is held in float32 now.
    told = engine.shelf.describe()["bytes"]
    assert told == held_bytes(_base_on(engine.shelf)) > size


@pytest.fixture
def gone_at_reading(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No base can be taken over. `lean` is the reference to look at when files are read, `gone` what was seen."""
    seen: dict[str, Any] = {"lean": lambda: None, "gone": []}
    list_shards = weights.list_shards

    def look(*arguments: Any) -> dict[str, list[str]]:
        # Not by a collection of the test's own.
        seen["gone"].append(seen["lean"]() is None)
        return list_shards(*arguments)

    def refuse(*arguments: Any) -> None:
        raise NotTensorForTensor("another model")

    monkeypatch.setattr(promotion, "promote", refuse)
    monkeypatch.setattr(weights, "list_shards", look)
    return seen


def test_a_base_that_cannot_be_taken_over_is_read(
    workspace: Workspace, run_in_process: RunInProcess, gone_at_reading: dict[str, Any]
) -> None:
    fresh = _sample(workspace, run_in_process, "from-files", shelf=BaseShelf())
    shelf = _leave_lean_base(workspace, run_in_process, "before-reading")
    gone_at_reading["lean"] = weakref.ref(_base_on(shelf))
    gone_at_reading["gone"].clear()
    log = _sample(workspace, run_in_process, "read-anew", shelf=shelf)
    assert log.states == ["RUNNING", "SUCCEEDED"]
    assert "resident" not in log.stage_details("WEIGHTS")
    assert "resident" not in log.stage_details("QUANTIZATION")
    assert gone_at_reading["gone"] == [True]
    assert [step.loss for step in log.of("step")] == [step.loss for step in fresh.of("step")]
    assert shelf.describe()["bytes"] == held_bytes(_base_on(shelf))


def test_an_answer_reads_a_base_that_it_cannot_take_over(
    workspace: Workspace, run_in_process: RunInProcess, gone_at_reading: dict[str, Any]
) -> None:
    model = workspace.place_model(TinyOptions())
    engine = InProcessEngine(workspace)
    engine.shelf = BaseShelf()
    cold = engine.ask("Who?", model=model, quantization="nf4")
    engine.shelf = _leave_lean_base(workspace, run_in_process, "before-reading-answer", base_model=model)
    gone_at_reading["lean"] = weakref.ref(_base_on(engine.shelf))
    gone_at_reading["gone"].clear()
    answered = engine.ask("Who?", model=model, quantization="nf4")
    assert answered.text == cold.text
    assert answered.last["statistics"]["warm"] is False
    assert gone_at_reading["gone"] == [True]
