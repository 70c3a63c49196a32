"""The node client against a node over real gRPC: refusals, blobs, streams, and a node that goes away."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

import grpc
import pytest

from control_service.adapters.gpu_client.client import GrpcNodeClient, GrpcNodeDialer, NodeClientConfig
from control_service.app.ports import PlanLevel, StartRun
from control_service.domain.errors import DeadlineTooShort, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from control_service.domain.run import ResumeFrom, RunKey, RunState, StopMode
from control_service.domain.spec import DatasetReference, TrainingSpec, Trait, TraitDataset
from tests.fakes.gpu_node import MODEL, FakeGpuNode
from tests.fakes.gpu_refusal import Refusal

CONTENT = bytes(range(256)) * 20_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
KEY = RunKey(installation_id="i", job_id="01ARZ3NDEKTSV4RRFFQ69G5FAV", attempt=2)
SPEC = TrainingSpec(
    base_model=MODEL,
    model_type="llama",
    training_type="qlora",
    traits=(Trait(trait_type="t", datasets=(TraitDataset(dataset_id=1, percentage=100.0),), weight=0.0),),
    datasets=(DatasetReference(dataset_id=1, sha256=SHA256, size_bytes=len(CONTENT), format="text", num_examples=1),),
    hyperparameters={"seed": "9007199254740993", "num_steps": 3},
)


@pytest.fixture
async def client(node: FakeGpuNode) -> AsyncIterator[GrpcNodeClient]:
    dialer = GrpcNodeDialer(config=NodeClientConfig())
    client = dialer.dial(name="fake", address=node.address, installation_id="i")
    yield client
    await client.close()


async def _chunks(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def test_a_blob_goes_over_and_comes_back(client: GrpcNodeClient) -> None:
    assert await client.find_missing_blobs([SHA256]) == {SHA256: 0}
    with pytest.raises(NotFound):
        [chunk async for chunk in client.read_blob(SHA256)]
    with pytest.raises(InvalidArgument) as caught:
        await client.write_blob(sha256=SHA256, size_bytes=3, offset=0, chunks=_chunks(b"abc"))
    assert caught.value.reason == "CHECKSUM_MISMATCH"
    await client.write_blob(sha256=SHA256, size_bytes=len(CONTENT), offset=0, chunks=_chunks(CONTENT))
    assert await client.find_missing_blobs([SHA256]) == {}
    assert b"".join([chunk async for chunk in client.read_blob(SHA256, offset=5)]) == CONTENT[5:]


async def test_a_run_is_started_with_everything_and_watched_to_its_end(
    client: GrpcNodeClient, node: FakeGpuNode
) -> None:
    request = StartRun(
        key=KEY,
        spec=SPEC,
        spec_digest=SPEC.digest(),
        weights_digest="w",
        resume_from=ResumeFrom(checkpoint="step-00000001", step=1, attempt=1),
    )
    with pytest.raises(FailedPrecondition) as caught:
        await client.start_run(request)
    assert (caught.value.reason, caught.value.details["sha256"]) == ("BLOB_NOT_FOUND", SHA256)
    assert await client.get_run(KEY) is None
    assert await client.stop_run(KEY, mode=StopMode.CANCEL) is None
    node.blobs[SHA256] = CONTENT
    assert (await client.start_run(request)).state is RunState.ACCEPTED
    received = node.started[0]
    assert received.spec.hyperparameters.seed == 9007199254740993
    assert received.spec.traits[0].HasField("weight")
    assert (received.weights_digest, received.resume_from.step, received.key.attempt) == ("w", 1, 2)
    events = [event async for batch in client.watch_run(KEY, after_run_sequence=2) for event in batch]
    assert [event.run_sequence for event in events] == list(range(3, 3 + len(events)))
    assert all(event.sequence == 0 and event.attempt == 2 for event in events)
    run = await client.get_run(KEY)
    assert run is not None
    assert run.is_over
    assert {artifact.name for artifact in run.artifacts} == {"adapter", "report"}
    assert await client.release_run(KEY) > 0


async def test_a_plan_is_proto_json_or_the_nodes_own_refusal(client: GrpcNodeClient, node: FakeGpuNode) -> None:
    plan = await client.plan_run(spec=SPEC, level=PlanLevel.CHECK)
    assert (plan["num_steps"], plan["level"]) == ("4", "PLAN_LEVEL_CHECK")
    node.plan_refusal = Refusal(
        grpc.StatusCode.INVALID_ARGUMENT, "MIX_INFEASIBLE", "too few", {"stage": "PLANNING", "fault": "USER"}
    )
    with pytest.raises(InvalidArgument) as caught:
        await client.plan_run(spec=SPEC, level=PlanLevel.EXACT)
    assert (caught.value.reason, caught.value.message) == ("MIX_INFEASIBLE", "too few")
    assert caught.value.details == {"stage": "PLANNING", "fault": "USER", "node": "fake"}


async def test_a_plan_that_needs_more_time_says_so(client: GrpcNodeClient, node: FakeGpuNode) -> None:
    node.hold_plans = True
    with pytest.raises(DeadlineTooShort, match="DEADLINE_TOO_SHORT"):
        await client.plan_run(spec=SPEC, level=PlanLevel.CHECK, timeout_seconds=0.2)


async def test_a_node_that_goes_away_and_comes_back(client: GrpcNodeClient, node: FakeGpuNode) -> None:
    reports = client.watch_node(heartbeat_seconds=60)
    report = await anext(reports)
    assert (report.node_name, report.accepting) == ("fake", True)
    await node.stop()
    with pytest.raises(Unavailable) as caught:
        await anext(reports)
    assert caught.value.reason == "NODE_UNREACHABLE"
    with pytest.raises(Unavailable):
        await client.capabilities()
    await node.start()
    async with asyncio.timeout(60):
        while True:
            try:
                capabilities = await client.capabilities()
                break
            except Unavailable:
                # The channel tries again by itself; how soon is its own affair.
                await asyncio.sleep(0.05)
    assert capabilities.model_types[0].details == {"config_types": "llama"}
    assert capabilities.instance_id != report.instance_id


async def test_a_reader_that_leaves_cancels_its_stream(client: GrpcNodeClient, node: FakeGpuNode) -> None:
    reports = client.watch_node(heartbeat_seconds=60)
    await anext(reports)
    assert node.num_node_watchers == 1
    await reports.aclose()  # type: ignore[attr-defined]
    async with asyncio.timeout(60):
        await node.until_unwatched()


async def test_a_closed_client_says_that_the_node_is_unreachable(client: GrpcNodeClient, node: FakeGpuNode) -> None:
    """Its users are tasks that nobody cancelled: a cancel of the connection's must not end them."""
    reports = client.watch_node(heartbeat_seconds=60)
    await anext(reports)
    next_report = asyncio.ensure_future(anext(reports))
    await client.close()
    with pytest.raises(Unavailable, match="NODE_UNREACHABLE"):
        await next_report
    for call in (client.capabilities(), client.get_run(KEY), anext(client.watch_run(KEY, after_run_sequence=0))):
        with pytest.raises(Unavailable, match="NODE_UNREACHABLE"):
            await call


async def test_bytes_that_cannot_be_read_are_the_error_of_the_write(client: GrpcNodeClient) -> None:
    async def damaged() -> AsyncIterator[bytes]:
        yield CONTENT[:10]
        raise NotFound("BLOB_NOT_FOUND", "the bytes are gone")

    with pytest.raises(NotFound, match="BLOB_NOT_FOUND"):
        await client.write_blob(sha256=SHA256, size_bytes=len(CONTENT), offset=0, chunks=damaged())


async def test_a_node_that_falls_silent_in_the_middle_of_a_blob(node: FakeGpuNode) -> None:
    node.blobs[SHA256] = CONTENT
    node.hold_reads = True
    dialer = GrpcNodeDialer(config=NodeClientConfig(read_idle_seconds=0.5))
    client = dialer.dial(name="fake", address=node.address, installation_id="i")
    try:
        chunks = client.read_blob(SHA256)
        assert await anext(chunks)
        with pytest.raises(Unavailable, match="nothing arrived"):
            await anext(chunks)
    finally:
        await client.close()
