"""Links and streams that break: a few of each scenario that `make faults` runs to its full count."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from control_service.api import server_options as control_options
from gpu_service.api import server_options as gpu_options
from tests.fakes.control import control, until
from tests.fakes.gpu_node import FakeGpuNode
from tests.faults.scenario import Finding, Trial
from tests.faults.scenarios.compaction_race import race
from tests.faults.scenarios.cut_consumers import cut_consumers
from tests.faults.scenarios.deadlines import stand_still
from tests.faults.scenarios.locked_store import lock_store
from tests.faults.scenarios.rolling_restart import restart_in_turn
from tests.faults.scenarios.sender_kills import kill_senders
from tests.faults.tcp_proxy import TcpProxy
from tunesmith.control.v1 import job_service_pb2, job_service_pb2_grpc
from tunesmith.gpu.v1 import run_service_pb2, run_service_pb2_grpc

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(directory=tmp_path, seed=20261122)


def held(findings: Sequence[Finding], *promises: str) -> bool:
    """Whether every promise held, and these were tried."""
    assert [finding for finding in findings if finding.held < finding.tried or finding.violations] == []
    return set(promises) <= {finding.promise for finding in findings if finding.tried}


def test_a_sender_that_dies_after_it_sent_repeats_nothing(trial: Trial) -> None:
    assert held(kill_senders(trial, num_sender_kills=1, num_receiver_kills=1), "R8", "R9")


def test_consumers_that_are_cut_while_control_restarts_are_given_the_log(trial: Trial) -> None:
    assert held(cut_consumers(trial, num_consumers=6, num_cuts=3, restarts=(signal.SIGTERM,)), "R9")


def test_every_call_ends_by_its_deadline_and_a_job_is_made_once(trial: Trial) -> None:
    # The promise is a second; here the machine may have other things to do.
    assert held(stand_still(trial, num_rounds=1, slack_seconds=20.0), "R28")


def test_a_locked_store_is_said_and_heals(trial: Trial) -> None:
    assert held(lock_store(trial, lock_seconds=2.0), "R22", "R1")


def test_a_rolling_restart_is_not_noticed(trial: Trial) -> None:
    assert held(restart_in_turn(trial, num_rounds=1), "R26", "R4")


def test_compaction_under_watchers_leaves_no_gap(trial: Trial) -> None:
    assert held(race(trial, num_rounds=3), "R11")


async def test_services_notice_a_link_that_is_gone_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the product waits for half a minute, in a second; `half_open` tries it with the product's own settings.
    quick = {"grpc.keepalive_time_ms": 1000, "grpc.keepalive_timeout_ms": 1000, "grpc.http2.ping_timeout_ms": 1000}
    options = tuple((dict(control_options.SERVER_OPTIONS) | quick).items())
    monkeypatch.setattr("control_service.bootstrap.SERVER_OPTIONS", options)
    node = FakeGpuNode(num_steps=5)
    node.server_options = tuple((dict(gpu_options.SERVER_OPTIONS) | quick).items())
    node.hold_at_step = 2
    await node.start()
    try:
        async with (
            control(tmp_path / "control", node, max_watches=1) as client,
            TcpProxy.to(client.address) as front,
            TcpProxy.to(node.address) as back,
        ):
            await client.until_node_reachable()
            dataset = await client.upload("rows")
            project = await client.create_project(dataset_id=dataset.dataset_id)
            job_id = (await client.start_training(project.project_id)).job_id
            async with watching(front, job_id), watching_node(back):
                for link in (front, back):
                    assert not link.num_ended_by_upstream
                    link.link.black_hole = True
                for link in (front, back):
                    await until(lambda link=link: link.num_ended_by_upstream > 0)  # type: ignore[misc]
            # Its place is free.
            async for event in client.events(job_id):
                assert event.sequence == 1
                break
    finally:
        await node.release()
        await node.close()


@asynccontextmanager
async def watching(link: TcpProxy, job_id: str) -> AsyncIterator[None]:
    """A watch over the link that has been given something."""
    async with grpc.aio.insecure_channel(link.address) as channel:
        stub: Any = job_service_pb2_grpc.JobServiceStub(channel)
        call = stub.WatchJob(job_service_pb2.WatchJobRequest(job_id=job_id))
        assert await call.read()
        yield


@asynccontextmanager
async def watching_node(link: TcpProxy) -> AsyncIterator[None]:
    """A stream of a node's reports over the link."""
    async with grpc.aio.insecure_channel(link.address) as channel:
        stub: Any = run_service_pb2_grpc.RunServiceStub(channel)
        call = stub.WatchNode(run_service_pb2.WatchNodeRequest(heartbeat_seconds=0.5))
        assert await call.read()
        yield
