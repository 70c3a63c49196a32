"""Kernels are launched on the engine's device, whichever it is: every thread that launches some is on it before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu_service.engine import devices, head_start
from gpu_service.engine.devices import CpuDevice
from gpu_service.engine.request import DeviceChoice
from gpu_service.engine.resident import BaseShelf
from tests.fakes.engine_runs import RunLog, Workspace
from tests.fakes.generations import InProcessEngine
from tests.fakes.tiny_models import TinyOptions

pytestmark = pytest.mark.timeout(240)

_SECOND = torch.device("cuda", 1)


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.device]]:
    """Names of threads, and the devices that they were set to."""
    seen: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((threading.current_thread().name, device)))
    return seen


def test_the_thread_of_a_head_start_is_on_the_runs_device(
    current: list[tuple[str, torch.device]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[int] = []

    def launch(*arguments: Any, **options: Any) -> torch.Tensor:
        before.append(len(current))
        raise RuntimeError("no device")

    monkeypatch.setattr(torch, "ones", launch)
    with head_start.preparing(_SECOND):
        pass
    assert current == [("head-start", _SECOND)]
    assert before == [1]


def test_a_device_is_made_the_threads(current: list[tuple[str, torch.device]]) -> None:
    devices.select(DeviceChoice(type="cuda", index=1)).make_current()
    devices.select(DeviceChoice(type="cpu")).make_current()
    assert [device for _, device in current] == [_SECOND]


def test_a_machine_without_the_device_is_told_so_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices.select(DeviceChoice(type="cuda", index=1)).make_current()


@pytest.fixture
def first_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the device's methods an engine's main thread called, in their order."""
    called: list[str] = []

    def note(name: str) -> None:
        method = getattr(CpuDevice, name)

        def noted(device: CpuDevice) -> Any:
            called.append(name)
            return method(device)

        monkeypatch.setattr(CpuDevice, name, noted)

    note("make_current")
    note("describe")
    return called


def test_a_run_is_on_its_device_before_it_plans(
    workspace: Workspace, run_in_process: Callable[..., RunLog], first_called: list[str]
) -> None:
    log = run_in_process(workspace.make_run("current", training_type="lora"), shelf=BaseShelf())
    assert log.states == ["RUNNING", "SUCCEEDED"]
    assert first_called.index("make_current") < first_called.index("describe")


def test_an_answer_is_on_its_device_before_it_loads(workspace: Workspace, first_called: list[str]) -> None:
    answered = InProcessEngine(workspace).ask("Who?", model=workspace.place_model(TinyOptions()))
    assert answered.last["finish_reason"] == "LENGTH"
    assert first_called[0] == "make_current"
