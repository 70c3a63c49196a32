"""`tunesmith plan` and memory: the parts of the estimate, and a probe when it is asked for."""

from collections.abc import Iterator

import pytest

from tests.fakes.scripted_control import FakeControl
from tunesmith.common.v1 import plan_pb2
from tunesmith.control.v1 import job_service_pb2, project_service_pb2
from tunesmith_cli.main import main

_MEMORY = plan_pb2.MemoryEstimate(
    weights_bytes=3 << 30,
    activations_bytes=2 << 30,
    overhead_bytes=1 << 30,
    total_bytes=6 << 30,
    peak_bytes=5 << 30,
    host_bytes=3 << 29,
    basis="calibrated",
)
_PROBE = plan_pb2.MemoryProbe(
    peak_bytes=4 << 30, predicted_bytes=5 << 30, step_tokens=4096, longest_tokens=900, seconds=9
)


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeControl]:
    with FakeControl() as fake:
        monkeypatch.setenv("TUNESMITH_ADDRESS", fake.address)
        project = project_service_pb2.Project(project_id=1, name="demo")
        fake.handlers["GetProject"] = lambda *_: project_service_pb2.GetProjectResponse(project=project)

        def answer(request: job_service_pb2.PlanTrainingRequest, _: object) -> job_service_pb2.PlanTrainingResponse:
            probe = _PROBE if request.probe_memory else None
            plan = plan_pb2.Plan(level=request.level, memory=_MEMORY, memory_probe=probe, device="H100")
            return job_service_pb2.PlanTrainingResponse(plan=plan, node="local")

        fake.handlers["PlanTraining"] = answer
        yield fake


def test_a_plan_shows_what_memory_is_made_of(control: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "1"]) == 0
    out = capsys.readouterr().out
    assert "memory       6.0 GiB estimated, on H100" in out
    assert "weights 3.0 GiB, activations 2.0 GiB, overhead 1.0 GiB" in out
    assert "peak         5.0 GiB predicted, by arithmetic and what this node measured" in out
    assert "host memory  1.5 GiB locked" in out
    assert "measured on" not in out


def test_a_probe_is_asked_for_and_shown(control: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "1", "--probe-memory"]) == 0
    assert "4.0 GiB measured on a step of 4,096 tokens (longest example 900) in 9 s" in capsys.readouterr().out
    (call,) = control.calls("PlanTraining")
    assert call.probe_memory
    assert call.level == plan_pb2.PLAN_LEVEL_EXACT


def test_a_probe_needs_the_exact_plan(control: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "1", "--check", "--probe-memory"]) == 2
    assert "--check" in capsys.readouterr().err
    assert control.calls("PlanTraining") == []
