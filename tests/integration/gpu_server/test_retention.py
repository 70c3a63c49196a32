"""The disk of a node: what a limit on the cache deletes, and what it leaves to a run that goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.fakes.gpu_runs import WAIT_SECONDS, wait_for
from tests.fakes.gpu_server import GpuServer, error_info
from tunesmith.common.v1 import event_pb2, plan_pb2
from tunesmith.gpu.v1 import run_service_pb2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GpuServer]:
    """Started, with room for nothing that is not in use."""
    made = GpuServer(tmp_path, cache_max_bytes=0)
    try:
        yield made.start()
    finally:
        made.clean_up()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.exists() else set()


def plan_exactly(server: GpuServer, request: run_service_pb2.StartRunRequest) -> set[str]:
    """Names of the plans that this made."""
    plans = server.data_directory / "cache" / "plans"
    before = names(plans)
    asked = run_service_pb2.PlanRunRequest(spec=request.spec, level=plan_pb2.PLAN_LEVEL_EXACT)
    server.runs.PlanRun(asked, timeout=WAIT_SECONDS)
    return names(plans) - before


def test_only_what_a_run_uses_stays_and_is_freed_after_it(server: GpuServer, tmp_path: Path) -> None:
    go = tmp_path / "go"
    options: dict[str, Any] = {"num_steps": 5, "script": {"hold_at": 2, "until_file": str(go)}}
    plans, tokens = server.data_directory / "cache" / "plans", server.data_directory / "cache" / "tokens"
    used = plan_exactly(server, server.request(**options))
    unused = plan_exactly(server, server.request(num_steps=9))
    assert used
    assert unused
    server.start_run(**options)
    wait_for(lambda: names(plans) == used, what="the end of the plan that nobody uses")
    assert names(tokens)
    digest = server.dataset["sha256"]
    blob = server.data_directory / "blobs" / digest[:2] / digest
    content = blob.read_bytes()
    os.utime(blob, (0, 0))
    go.touch()
    assert server.watch_to_end()[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED
    wait_for(lambda: not names(plans) and not names(tokens) and not blob.exists(), what="a free disk")
    # Asking again says what to push, and pushing it is all that it takes.
    with pytest.raises(grpc.RpcError) as refused:
        server.start_run("01NEXT")
    assert error_info(refused.value)[1] == "BLOB_NOT_FOUND"
    server.write_blob(content)
    server.start_run("01NEXT")
    assert server.watch_to_end("01NEXT")[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED
