"""PlanRun with `probe_memory`: a real process loads the tiny model, and is gone afterwards."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.fakes.gpu_runs import WAIT_SECONDS, processes_of, wait_for
from tests.fakes.gpu_server import INSTALLATION, GpuServer, error_info
from tunesmith.common.v1 import plan_pb2
from tunesmith.gpu.v1 import run_service_pb2

EXACT = plan_pb2.PLAN_LEVEL_EXACT


def _request(server: GpuServer, **fields: Any) -> run_service_pb2.PlanRunRequest:
    return run_service_pb2.PlanRunRequest(
        spec=server.request(num_steps=3).spec,
        installation_id=INSTALLATION,
        **{"level": EXACT, "probe_memory": True, **fields},
    )


def _plan(server: GpuServer, **fields: Any) -> plan_pb2.Plan:
    return server.runs.PlanRun(_request(server, **fields), timeout=WAIT_SECONDS).plan


def _refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return error_info(caught.value)


def test_probe_measures_and_calibrates(server: GpuServer) -> None:
    plain = _plan(server, probe_memory=False)
    assert not plain.HasField("memory_probe")
    assert plain.memory.basis == "analytic"

    probed = _plan(server)
    probe = probed.memory_probe
    assert probe.predicted_bytes == plain.memory.peak_bytes
    # The process alone, with torch, is larger than this.
    assert probe.peak_bytes > 100 << 20
    assert probe.step_tokens == plain.largest_step_tokens
    assert 0 < probe.longest_tokens <= plain.longest_example_tokens
    assert probed.data_digest == plain.data_digest

    # Nothing of it is left but the measurement, and the next plan rests on that.
    assert not list((server.data_directory / "requests").iterdir())
    assert not list((server.data_directory / "engines").iterdir())
    records = json.loads((server.data_directory / "memory.json").read_text())
    (cells,) = records["kinds"].values()
    assert cells == [[plain.memory.analytic_bytes, probe.peak_bytes]]
    later = _plan(server, probe_memory=False)
    assert later.memory.basis == "calibrated"
    assert later.memory.peak_bytes >= probe.peak_bytes
    assert later.memory.analytic_bytes == plain.memory.analytic_bytes


def test_probe_needs_the_exact_level_and_a_free_device(server: GpuServer) -> None:
    code, reason, _ = _refusal(lambda: _plan(server, level=plan_pb2.PLAN_LEVEL_CHECK))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")

    server.start_run(num_steps=100000)
    code, reason, _ = _refusal(lambda: _plan(server))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_BUSY")


def test_probe_that_fails_says_why(server: GpuServer) -> None:
    config = server.models_directory / "org/name/config.json"
    document = json.loads(config.read_text())
    config.write_text(json.dumps({**document, "num_attention_heads": 3}))
    code, reason, details = _refusal(lambda: _plan(server))

    assert (code, reason) == (grpc.StatusCode.INTERNAL, "MEMORY_PROBE")
    assert details["cause"].startswith("LOAD_")
    assert not list((server.data_directory / "requests").iterdir())
    # The device is free again.
    assert server.runs.PlanRun(_request(server, probe_memory=False), timeout=WAIT_SECONDS).plan.num_steps


def test_killed_server_leaves_no_probe_even_if_that_hangs(server: GpuServer) -> None:
    # Kept: a call that nobody holds is cancelled.
    call = server.runs.PlanRun.future(_request(server), timeout=WAIT_SECONDS)
    requests = server.data_directory / "requests"
    wait_for(lambda: list(requests.glob("probe-*/run.json")), what="the probe's directory")
    (directory,) = requests.glob("probe-*")
    (probe,) = wait_for(lambda: processes_of(directory), what="the probe's process")
    # It reads its pipe from now on; stopped, it cannot.
    wait_for(lambda: len(list(Path(f"/proc/{probe}/task").iterdir())) > 1, what="the probe's second thread")
    os.kill(probe, signal.SIGSTOP)
    server.kill()
    wait_for(lambda: not processes_of(directory), what="the end of the probe")
    assert call.exception(WAIT_SECONDS) is not None


def test_caller_that_goes_away_leaves_no_process(server: GpuServer) -> None:
    call = server.runs.PlanRun.future(_request(server), timeout=WAIT_SECONDS)
    requests = server.data_directory / "requests"
    wait_for(lambda: list(requests.glob("probe-*/run.json")), what="the probe's directory")
    (directory,) = requests.glob("probe-*")
    wait_for(lambda: processes_of(directory), what="the probe's process")
    call.cancel()
    wait_for(lambda: not processes_of(directory) and not directory.exists(), what="the end of the probe")
