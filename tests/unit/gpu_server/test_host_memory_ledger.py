"""Memory of the host that runs lock: it is one for all devices of a node, so it is added up, and who comes later is
told.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from gpu_service import host_memory
from gpu_service.api.errors import status_of
from gpu_service.domain.errors import Refusal
from gpu_service.domain.memory import MemoryLedger, check_host_room, is_host_short
from gpu_service.domain.recomputation import HOST_SPARE_BYTES
from gpu_service.journal import Writer, events
from gpu_service.runs.planning import Planning
from gpu_service.runs.run import Run
from tests.unit.gpu_server.test_admission import GIB, Node, gpu
from tunesmith.common.v1 import event_pb2, plan_pb2


def test_what_runs_hold_adds_up_until_they_leave() -> None:
    ledger = MemoryLedger()
    for index, name in enumerate("ab"):
        ledger.reserve(
            run_id=name, device_id=f"cuda:{index}", num_bytes=1, capacity_bytes=1, host_bytes=10 * (index + 1)
        )
    assert ledger.host_bytes_beside() == 30
    assert ledger.host_bytes_beside({"a"}) == 20
    # The exact plan knows better; one that has no device changes nothing.
    ledger.note_host_bytes("b", 5)
    ledger.note_host_bytes("c", 1000)
    assert ledger.host_bytes_beside() == 15
    held = ledger.release("b")
    assert ledger.host_bytes_beside() == 10
    assert held is not None
    ledger.restore(held)
    assert ledger.host_bytes_beside() == 15


@pytest.mark.parametrize(
    ("needed", "taken", "total", "is_short"),
    [
        (5, 5, HOST_SPARE_BYTES + 10, False),
        (5, 6, HOST_SPARE_BYTES + 10, True),
        # That there is not so much at all is for its exact plan to say.
        (50, 0, HOST_SPARE_BYTES + 10, False),
        (0, 1000, 10, False),
        (5, 1000, 0, False),
    ],
)
def test_only_what_others_hold_keeps_a_run_from_it(needed: int, taken: int, total: int, is_short: bool) -> None:
    assert is_host_short(needed, taken_bytes=taken, total_bytes=total) is is_short
    if not is_short:
        check_host_room(needed, taken_bytes=taken, total_bytes=total, device_id="cuda:1")
        return
    with pytest.raises(Refusal, match="NODE_BUSY") as refused:
        check_host_room(needed, taken_bytes=taken, total_bytes=total, device_id="cuda:1")
    assert refused.value.details == {"device": "cuda:1", "retry_after_seconds": "30"}
    status = status_pb2.Status.FromString(
        dict(status_of(refused.value).trailing_metadata or ())["grpc-status-details-bin"]
    )
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 30


def _offloading(root: Path) -> Node:
    """A node with three devices, and a run that offloads; there is no memory of the host but what is left alone."""
    node = Node(root, [gpu(index) for index in range(3)])
    node.spec["hyperparameters"] = {"recomputation": {"offload": True}}
    node.host_memory_bytes = HOST_SPARE_BYTES
    return node


async def test_a_second_run_waits_for_memory_that_the_first_one_has(tmp_path: Path) -> None:
    node = _offloading(tmp_path)
    # Nobody else has any of it: the exact plan judges.
    needed = (await node.admit("a/1")).host_bytes
    assert needed > 0
    assert node.ledger.host_bytes_beside() == needed
    node.host_memory_bytes = HOST_SPARE_BYTES + 2 * needed - 1
    with pytest.raises(Refusal, match="NODE_BUSY") as refused:
        await node.admit("b/1")
    assert "host's memory" in refused.value.message
    assert node.ledger.holder_of("cuda:1") is None
    # One that leaves holds nothing against its successor, and one that offloads nothing needs none of it.
    node.ledger.release("a/1")
    node.ledger.reserve(run_id="a/1", device_id="cuda:2", num_bytes=0, capacity_bytes=0, host_bytes=needed)
    assert (await node.admit("a/2", leaving=["a/1"])).device.index == 0
    node.spec["hyperparameters"] = {}
    assert (await node.admit("c/1")).host_bytes == 0


async def test_runs_share_it_where_the_first_one_is_planned_and_needs_less(tmp_path: Path) -> None:
    node = _offloading(tmp_path)
    needed = (await node.admit("a/1")).host_bytes
    node.host_memory_bytes = HOST_SPARE_BYTES + needed + 10
    node.ledger.note_host_bytes("a/1", 10)
    assert (await node.admit("b/1")).device.index == 1
    with pytest.raises(Refusal, match="NODE_BUSY"):
        await node.admit("c/1")


async def test_a_plan_says_that_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = _offloading(tmp_path)
    monkeypatch.setattr(host_memory, "total_bytes", lambda: HOST_SPARE_BYTES)
    planning: Planning = node.admission._planning

    def taken_bytes() -> int:
        # Runs come and go on the loop: a thread that adds up what they hold finds them changing.
        assert asyncio.get_running_loop()
        return node.ledger.host_bytes_beside()

    monkeypatch.setattr(planning, "_taken_host_bytes", taken_bytes)
    plain = await planning.checked(node.spec, gpu(1))
    assert not any("host's memory" in warning for warning in plain["warnings"])
    await node.admit("a/1")
    told = await planning.checked(node.spec, gpu(1))
    (warning,) = [warning for warning in told["warnings"] if "host's memory" in warning]
    assert f"hold {node.ledger.host_bytes_beside():,} now" in warning
    assert {**told, "warnings": []} == {**plain, "warnings": []}


async def test_a_run_holds_what_it_may_need_then_what_its_plan_says_then_nothing(tmp_path: Path) -> None:
    content = {
        "installation_id": "i",
        "job_id": "j",
        "attempt": 1,
        "spec_digest": "",
        "weights_digest": "",
        "device": {"type": "cuda", "index": 0},
        "host_bytes": 3 * GIB,
    }
    changes: list[int] = []
    run = Run(directory=tmp_path, content=content, on_change=lambda: changes.append(run.host_bytes))
    assert run.host_bytes == 3 * GIB
    with Writer.open(tmp_path / "journal", 1) as writer:
        for event in (
            event_pb2.RunStateEvent(state=event_pb2.RUN_STATE_RUNNING),
            event_pb2.PhaseEvent(phase=event_pb2.PHASE_PLANNING),
        ):
            writer.append(events.wrap(event))
        await run.refresh()
        assert run.host_bytes == 3 * GIB
        writer.append(events.wrap(plan_pb2.Plan(memory=plan_pb2.MemoryEstimate(host_bytes=GIB))))
        await run.refresh()
        assert run.host_bytes == GIB
        writer.append(events.wrap(event_pb2.RunStateEvent(state=event_pb2.RUN_STATE_SUCCEEDED)))
        await run.refresh()
    assert run.host_bytes == 0
    # Whoever adds up is told of each.
    assert changes == [3 * GIB, GIB, 0]
    await run.close()
