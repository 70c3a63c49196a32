"""What Triton is asked ahead; Triton and the driver are played, since a machine without a GPU has neither."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from gpu_service.engine import kernel_facts
from gpu_service.engine.device_facts import DriverFailed
from gpu_service.engine.request import DeviceChoice

_DEVICE = DeviceChoice(type="cuda", index=0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """What was called, with what."""
    called: list[tuple[str, tuple[Any, ...]]] = []
    for name, (function, _) in kernel_facts._FACTS.items():
        module = ModuleType(name)
        setattr(module, function, lambda *arguments, function=function: called.append((function, arguments)))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernel_facts, "open_device", lambda device: lambda: {"compute_capability": "9.0"})
    return called


def test_triton_is_asked_for_what_its_first_kernel_waits_for(asked: list[tuple[str, tuple[Any, ...]]]) -> None:
    kernel_facts.find_out(_DEVICE)
    assert asked == [("triton_key", ()), ("library_dirs", ()), ("get_ptxas_version", (90,))]


def test_a_name_that_moved_keeps_nothing_else_from_being_found_out(
    asked: list[tuple[str, tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=kernel_facts.__name__)
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", ModuleType("triton.runtime.cache"))
    monkeypatch.setitem(sys.modules, "triton.backends.nvidia.driver", None)
    kernel_facts.find_out(_DEVICE)
    assert asked == [("get_ptxas_version", (90,))]
    assert caplog.text.count("not found out ahead") == 2


def test_a_program_that_is_not_there_keeps_nothing_else_from_being_found_out(
    asked: list[tuple[str, tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> str:
        raise FileNotFoundError("ldconfig")

    caplog.set_level("INFO", logger=kernel_facts.__name__)
    monkeypatch.setattr(sys.modules["triton.backends.nvidia.driver"], "library_dirs", fail)
    kernel_facts.find_out(_DEVICE)
    assert asked == [("triton_key", ()), ("get_ptxas_version", (90,))]
    assert "FileNotFoundError: ldconfig" in caplog.text


def test_a_device_that_does_not_answer_is_left_to_the_run(
    asked: list[tuple[str, tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device: DeviceChoice) -> Any:
        raise DriverFailed("cuInit gave 999")

    monkeypatch.setattr(kernel_facts, "open_device", refuse)
    kernel_facts.find_out(_DEVICE)
    assert not asked
