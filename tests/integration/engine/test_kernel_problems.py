"""An engine that cannot compile kernels: it comes up all the same, says so, and trains by the libraries."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, cast

import pytest
import torch

from gpu_service.engine import devices, warm_up
from gpu_service.engine.fast_path import kernel_problems
from gpu_service.engine.resident import BaseShelf
from gpu_service.engine.run import KERNELS_NOT_COMPILED
from tests.fakes.engine_runs import RunLog, Workspace
from tunesmith.common.v1 import errors_pb2

pytestmark = pytest.mark.timeout(240)

RunInProcess = Callable[..., RunLog]
_CUDA = torch.device("cuda")


class _TritonError(Exception):
    """Of no class that torch's errors are of, as Triton's own."""


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("triton.errors")
    module.TritonError = _TritonError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton.errors", module)


def _fail_with(error: Exception) -> Callable[..., Any]:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise error

    return refuse


def _fail_within(module: str, error: Exception) -> Callable[..., Any]:
    """As `_fail_with`, from code of that module."""
    refuse = cast(FunctionType, _fail_with(error))
    return FunctionType(refuse.__code__, {"__name__": module}, closure=refuse.__closure__)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (_TritonError("at 3:4:\n\ntype mismatch\n"), "_TritonError: type mismatch"),
        (
            subprocess.CalledProcessError(1, ["/usr/bin/cc", "-O3"]),
            "CalledProcessError: /usr/bin/cc ended with status 1",
        ),
        (subprocess.CalledProcessError(1, "gcc"), "CalledProcessError: gcc ended with status 1"),
        (subprocess.TimeoutExpired("ptxas", 1), "TimeoutExpired"),
        (ModuleNotFoundError("No module named 'triton'"), "ModuleNotFoundError"),
    ],
)
def test_one_small_kernel_tells(error: Exception, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_problems, "operations_for", _fail_with(error))
    problem = kernel_problems.find_problem(_CUDA)
    assert problem is not None
    assert problem.startswith(told)
    assert kernel_problems.find_problem(torch.device("cpu")) == ""


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("triton.runtime.build", RuntimeError("Failed to find C compiler")),
        ("triton.runtime.build", FileNotFoundError(2, "No such file", "/opt/cc")),
        ("triton.knobs", RuntimeError("Cannot find ptxas")),
    ],
)
def test_a_missing_program_is_told(module: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_problems, "operations_for", _fail_within(module, error))
    assert kernel_problems.find_problem(_CUDA) == kernel_problems.describe(error)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("module", "error"),
    [
        (__name__, torch.OutOfMemoryError("full")),
        ("triton.backends.nvidia.driver", RuntimeError("Triton Error [CUDA]: out of memory")),
        ("triton.runtime.build", OSError(28, "No space left on device")),
        ("triton.runtime.cache", FileNotFoundError(2, "No such file", "/cache/entry")),
    ],
)
def test_what_may_pass_is_asked_again(module: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_problems, "operations_for", _fail_within(module, error))
    shelf = BaseShelf()
    assert shelf.find_kernel_problem(_CUDA) == ""
    assert shelf.kernel_problem is None
    monkeypatch.setattr(kernel_problems, "operations_for", _fail_with(ImportError("no triton")))
    assert shelf.find_kernel_problem(_CUDA) == "ImportError: no triton"


def test_it_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = BaseShelf()
    monkeypatch.setattr(kernel_problems, "operations_for", _fail_with(ImportError("no triton")))
    assert shelf.find_kernel_problem(_CUDA) == "ImportError: no triton"
    monkeypatch.setattr(kernel_problems, "operations_for", _fail_with(ZeroDivisionError()))
    assert shelf.find_kernel_problem(_CUDA) == "ImportError: no triton"


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("part", ["_step", "load"])
@pytest.mark.parametrize("error", [_TritonError("no tiles"), subprocess.CalledProcessError(1, "ptxas")])
def test_a_kernel_that_cannot_be_compiled_ends_no_warm_up(
    part: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=warm_up.__name__)
    monkeypatch.setattr(warm_up, part, _fail_with(error))
    problem = warm_up.make_ready("cpu:-1", lambda: False)
    assert problem == kernel_problems.describe(error)
    assert "kernels cannot be compiled" in caplog.text


def test_what_a_warm_up_tells_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert warm_up.make_ready("cpu:-1", lambda: False) == ""
    assert warm_up.make_ready("cpu:-1", lambda: True) is None
    # What may be the device's trouble, or the disk's, says nothing of kernels.
    monkeypatch.setattr(warm_up, "_step", _fail_with(RuntimeError("device-side assert")))
    assert warm_up.make_ready("cpu:-1", lambda: False) is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU, planned for as a GPU whose kernels nobody has compiled yet."""
    told = {"type": "cuda", "name": "a card", "compute_capability": "9.0"}
    monkeypatch.setattr(devices.CpuDevice, "describe", lambda device: told)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("is_known", [False, True])
def test_a_run_is_planned_without_kernels_that_cannot_be_compiled(
    is_known: bool, workspace: Workspace, run_in_process: RunInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def find_problem(device: torch.device) -> str:
        asked.append(device)
        return "RuntimeError: Failed to find C compiler"

    monkeypatch.setattr(kernel_problems, "find_problem", find_problem)
    shelf = BaseShelf()
    if is_known:
        shelf.kernel_problem = "RuntimeError: Failed to find C compiler"
    directory = workspace.make_run(f"no-kernels-{is_known}", training_type="lora", trainer="fast")
    log = run_in_process(directory, shelf=shelf)
    assert log.states == ["RUNNING", "SUCCEEDED"]
    (plan,) = log.of("plan")
    assert plan.resolved.trainer == "reference"
    assert "Failed to find C compiler" in plan.trainer_reason
    assert [event.code for event in log.of("warning")].count(KERNELS_NOT_COMPILED) == 1
    assert any("transformers and PEFT" in event.message for event in log.of("log"))
    assert len(asked) == (0 if is_known else 1)
    # Its node takes it for a run of the fast path, and must not learn from it what those need.
    assert log.of("memory_measured")[0].analytic_bytes == 0


@pytest.mark.usefixtures("gpu")
def test_the_fast_path_that_was_asked_for_is_refused(
    workspace: Workspace, run_in_process: RunInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_problems, "find_problem", lambda device: "no compiler")
    log = run_in_process(workspace.make_run("asked", hyperparameters={"trainer": "fast"}), shelf=BaseShelf())
    assert log.states == ["RUNNING", "FAILED"]
    failure = log.of("run_state")[-1].failure
    assert failure.reason == errors_pb2.ERROR_REASON_COMBINATION_NOT_ALLOWED
    assert "no compiler" in failure.message


def test_kernels_that_can_be_compiled_change_nothing(workspace: Workspace, run_in_process: RunInProcess) -> None:
    shelf = BaseShelf()
    directory = workspace.make_run("kernels", hyperparameters={"trainer": "fast"}, trainer="fast")
    log = run_in_process(directory, shelf=shelf)
    assert log.states == ["RUNNING", "SUCCEEDED"]
    assert log.of("memory_measured")[0].analytic_bytes > 0
    assert not log.of("warning")
    assert shelf.kernel_problem == ""
