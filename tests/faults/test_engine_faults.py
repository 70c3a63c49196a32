"""What a node promises about its engines, a few trials each; `python -m tests.faults` makes the full counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from tests.fakes.cgroups import limited_memory
from tests.fakes.gpu_runs import (
    WAIT_SECONDS,
    ShimConnection,
    child_environment,
    summary_of,
    wait_for,
    write_engine,
    write_run,
)
from tests.fakes.gpu_server import GpuServer, error_info
from tests.fakes.hanging import WAYS
from tests.faults.nodes import running_node
from tests.faults.scenarios import cancels, engine_failures, hangs, orphans, quarantine, real_engine
from tunesmith.common.v1 import errors_pb2, event_pb2, generation_pb2
from tunesmith.gpu.v1 import inference_service_pb2

# Where each of the ways is met.
_PLACES = ("TRAINING", 3, "PLANNING", 2, "SAVING")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuServer]:
    """One server for every trial that leaves it as it was."""
    root = tmp_path_factory.mktemp("node")
    with running_node(root, shim_answer_seconds=1) as server:
        yield server


def test_hangs_are_found_by_progress_and_told_with_their_stacks(tmp_path: Path) -> None:
    """A node for each way: they mostly wait, and do so at once."""
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        limit = hangs.HANG_LIMIT_SECONDS
        nodes = [stack.enter_context(running_node(tmp_path / way, hang_limit_seconds=limit)) for way in WAYS]
        found = threads.map(
            lambda node, way, place: hangs.hang(node, way=way, place=place, job_id="01HANG")[0], nodes, WAYS, _PLACES
        )
        assert list(found) == [[]] * len(WAYS)


@pytest.mark.parametrize("behavior", sorted(set(cancels.BEHAVIORS) - {"shim-is-frozen"}))
def test_cancelled_means_gone(node: GpuServer, behavior: str) -> None:
    problems, _ = cancels.cancel(node, behavior=behavior, job_id=f"01CANCEL{list(cancels.BEHAVIORS).index(behavior)}")
    assert problems == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cancel_leaves_a_real_engine_and_the_planner_that_waits_for_it(tmp_path: Path) -> None:
    with running_node(tmp_path, real_engine="gpu_service.engine") as server:
        assert real_engine.cancel_while_planning(server) == []
        assert real_engine.cancel(server)[0] == []


def test_a_frozen_shim_is_noticed_and_buried(node: GpuServer) -> None:
    problems, _ = cancels.cancel_behind_a_frozen_shim(node, job_id="01FROZEN")
    assert problems == []


def test_a_device_that_holds_on_to_memory_is_told_passed_over_and_taken_back(tmp_path: Path) -> None:
    with running_node(tmp_path, fake_devices=True, grace_seconds=quarantine.GRACE_SECONDS) as server:
        assert quarantine.lose_memory(server)[0] == []


def test_each_failure_has_its_name_and_harms_nobody(tmp_path: Path) -> None:
    with running_node(tmp_path, fake_devices=True) as server:
        engine_failures.start_neighbor(server)
        ways = ("segmentation-fault", "exit", "exception")
        assert [problem for way in ways for problem in engine_failures.fail(server, way)] == []


@pytest.mark.parametrize("ends_stopped", [False, True])
def test_an_engine_whose_server_never_returns_checkpoints_and_ends(tmp_path: Path, ends_stopped: bool) -> None:
    with running_node(tmp_path, orphan_limit_seconds=orphans.ORPHAN_LIMIT_SECONDS, grace_seconds=2) as server:
        assert orphans.orphan(server, job_id="01ORPHAN", ends_stopped=ends_stopped)[0] == []


def test_an_idle_engine_that_dies_as_a_run_reaches_it_costs_nothing(node: GpuServer) -> None:
    node.start_run("01BEFORE")
    node.watch_to_end("01BEFORE")
    [shim] = node.shims()
    # It is told of the run, and dies before it has read that.
    os.kill(shim["engine_pid"], signal.SIGSTOP)
    node.start_run("01AFTER")
    wait_for(lambda: node.shims()[0]["run_directory"], what="the run's handing over")
    os.kill(shim["engine_pid"], signal.SIGKILL)
    events = node.watch_to_end("01AFTER")
    assert events[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED
    assert [one["engine_pid"] for one in node.shims()] != [shim["engine_pid"]]


def test_an_answer_that_hangs_is_refused_and_its_engine_ended(tmp_path: Path) -> None:
    limit = hangs.HANG_LIMIT_SECONDS
    script = {"endless": True, "hang_after": 2, "way": "spin"}
    with running_node(tmp_path, hang_limit_seconds=limit) as server:
        request = inference_service_pb2.GenerateRequest(
            base_model="org/name", messages=[generation_pb2.ChatMessage(role="user", content=json.dumps(script))]
        )
        parts = server.inference.Generate(request, timeout=WAIT_SECONDS)
        with pytest.raises(grpc.RpcError) as caught:
            list(parts)
        code, reason, details = error_info(caught.value)
        assert (reason, details["cause"]) == ("GENERATION", "HANG")
        assert code == grpc.StatusCode.INTERNAL
        wait_for(lambda: not server.living_processes(), what="the engine's end")
        server.start_run()
        assert server.watch_to_end()[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED


def test_an_engine_that_cannot_be_killed_keeps_its_device_from_use(tmp_path: Path) -> None:
    with running_node(
        tmp_path, fake_devices=True, grace_seconds=quarantine.GRACE_SECONDS, shim_answer_seconds=2
    ) as server:
        try:
            problems, _ = quarantine.keep_process(server)
        except OSError as error:
            pytest.skip(f"no control group that freezes: {error}")
        assert problems == []


def test_the_kernels_kill_for_memory_is_named(tmp_path: Path) -> None:
    engine, run = write_engine(tmp_path), write_run(tmp_path, script={"ballast_bytes": 1 << 30})
    with ExitStack() as stack:
        try:
            processes = stack.enter_context(limited_memory(300 << 20))
        except OSError as error:
            pytest.skip(f"no control group that limits memory: {error}")
        command = f"echo $$ > {processes} && exec {sys.executable} -m gpu_service.shim {engine}"
        with (engine / "engine.log").open("ab") as log:
            shim = subprocess.Popen(["sh", "-c", command], env=child_environment(), stdout=log, stderr=log)
        stack.callback(shim.wait, WAIT_SECONDS)
        stack.callback(shim.kill)
        connection = ShimConnection(engine)
        connection.send(type="start_run", run_directory=str(run))
        assert connection.receive("engine_exited")["signal"] == signal.SIGKILL
        connection.close()
        failure = summary_of(run).failure
        assert failure is not None
        assert failure.reason == errors_pb2.ERROR_REASON_HOST_OUT_OF_MEMORY
        assert shim.wait(WAIT_SECONDS) == 0


def test_the_kernels_kill_of_a_planner_for_memory_is_named(tmp_path: Path) -> None:
    with ExitStack() as stack:
        try:
            processes = stack.enter_context(limited_memory(300 << 20))
        except OSError as error:
            pytest.skip(f"no control group that limits memory: {error}")
        command = f"echo $$ > {processes} && exec {sys.executable} -m tests.fakes.hungry_planner {tmp_path} {1 << 30}"
        done = subprocess.run(
            ["sh", "-c", command],
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
    assert done.stdout.split() == ["ERROR_REASON_HOST_OUT_OF_MEMORY", "9"], done.stderr
