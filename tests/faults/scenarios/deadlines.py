"""R28: every method of both services is called while the service that should answer, or the link to it, stands still:
each call ends by its deadline. A job that was asked for then is made once, however often it is asked for."""

from __future__ import annotations

import asyncio
import random
import signal
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from tests.faults.driver import CONTROL, World, WorldConfig
from tests.faults.scenario import Finding, Scenario, Trial
from tests.faults.tcp_proxy import TcpProxy
from tunesmith.common.v1 import plan_pb2
from tunesmith.control.v1 import (
    artifact_service_pb2,
    dataset_service_pb2,
    inference_service_pb2,
    job_service_pb2,
    model_service_pb2,
    node_service_pb2,
    project_service_pb2,
)
from tunesmith.gpu.v1 import blob_service_pb2, run_service_pb2
from tunesmith.gpu.v1 import inference_service_pb2 as gpu_inference_service_pb2

_CONTROL_FILES = (
    artifact_service_pb2,
    dataset_service_pb2,
    inference_service_pb2,
    job_service_pb2,
    model_service_pb2,
    node_service_pb2,
    project_service_pb2,
)
_GPU_FILES = (run_service_pb2, blob_service_pb2, gpu_inference_service_pb2)
_SLACK_SECONDS = 1.0
_NUM_ROUNDS = 6
_ENDED = (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)


def run(trial: Trial) -> list[Finding]:
    """Some rounds of each kind of standstill."""
    return stand_still(trial, num_rounds=_NUM_ROUNDS, slack_seconds=_SLACK_SECONDS)


def methods(files: tuple[Any, ...]) -> Iterator[MethodDescriptor]:
    """Every method that these files declare."""
    for file in files:
        for service in file.DESCRIPTOR.services_by_name.values():
            yield from service.methods


def stand_still(trial: Trial, *, num_rounds: int, slack_seconds: float) -> list[Finding]:
    """Calls everything while a service is stopped or a link is pulled, and starts jobs across it."""
    late: list[str] = []
    took: list[float] = []
    with World(WorldConfig(directory=trial.directory, seed=trial.seed)) as world:
        project_id = world.create_project("p", [world.upload("rows")], num_steps=2)
        for _ in range(num_rounds):
            for name, files in ((CONTROL, _CONTROL_FILES), (world.config.nodes[0], _GPU_FILES)):
                deadline = world.random.uniform(0.3, 2.0)
                service = world.services[name]
                pulled = world.random.random() < 0.5
                if not pulled:
                    world.stop_service(name)
                ended = asyncio.run(_call_all(service.address, files, deadline, pulled=pulled))
                if name != CONTROL and not pulled:
                    # Control answers itself, and waits for the node no longer than its caller does.
                    ended += asyncio.run(_plan(world.control.address, project_id, deadline))
                world.continue_all()
                for method, seconds, code in ended:
                    took.append(seconds - deadline)
                    if seconds > deadline + slack_seconds or code not in _ENDED:
                        late.append(f"{method} ended {code.name} after {seconds:.2f} s of {deadline:.2f} s")
        wrong, num_jobs = _start_across_stops(world, project_id, num_rounds)
        world.heal()
        world.stop()
    return [
        Finding(
            promise="R28",
            tried=len(took) + num_jobs,
            held=len(took) + num_jobs - len(late) - len(wrong),
            violations=(*late, *wrong),
            worst=max(took),
            unit="s",
            what="behind a call's deadline until it ended",
        )
    ]


async def _call_all(
    address: str, files: tuple[Any, ...], deadline: float, *, pulled: bool
) -> list[tuple[str, float, grpc.StatusCode]]:
    """Each method once, all at the same time: its name, how long it took, and how it ended."""
    async with TcpProxy.to(address) as proxy:
        proxy.link.black_hole = pulled
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(proxy.address, options=options) as channel:
            return await asyncio.gather(*(_call(channel, method, deadline) for method in methods(files)))


async def _plan(address: str, project_id: int, deadline: float) -> list[tuple[str, float, grpc.StatusCode]]:
    """Plans of both levels, by way of a node."""
    method = job_service_pb2.DESCRIPTOR.services_by_name["JobService"].methods_by_name["PlanTraining"]
    requests = [
        job_service_pb2.PlanTrainingRequest(project_id=project_id, level=level)
        for level in (plan_pb2.PLAN_LEVEL_CHECK, plan_pb2.PLAN_LEVEL_EXACT)
    ]
    async with grpc.aio.insecure_channel(address) as channel:
        return await asyncio.gather(*(_call(channel, method, deadline, request) for request in requests))


async def _call(
    channel: Any, method: MethodDescriptor, deadline: float, request: Any = None
) -> tuple[str, float, grpc.StatusCode]:
    """A call of any kind, with an empty request by default; what would be refused is not answered either."""
    request = request or GetMessageClass(method.input_type)()
    kind = ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
    make = getattr(channel, kind)(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )

    async def requests() -> AsyncIterator[Any]:
        while True:
            yield request
            await asyncio.sleep(0.05)

    started = time.monotonic()
    call = make(requests() if method.client_streaming else request, timeout=deadline)
    try:
        if method.server_streaming:
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
        code = grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        code = error.code()
    return method.name, time.monotonic() - started, code


def _start_across_stops(world: World, project_id: int, num_jobs: int) -> tuple[list[str], int]:
    """Jobs that are asked for while control stops and goes on: each request makes one."""
    seeded = random.Random(world.config.seed)
    made: dict[str, set[str]] = {}
    for _ in range(num_jobs):
        request = job_service_pb2.StartTrainingRequest(project_id=project_id, request_id=uuid.uuid4().hex)
        world.stop_service(CONTROL)
        # It is in control's socket by now, and is carried out when nobody waits for it any more.
        assert world.client.call_once("StartTraining", [request], seconds=seeded.uniform(0.05, 0.5)) is None
        world.continue_all()
        answers = [world.client.call("StartTraining", request).job.job_id for _ in range(2)]
        made.setdefault(request.request_id, set()).update(answers)
    listed = world.client.call("ListJobs", job_service_pb2.ListJobsRequest(page_size=1000)).jobs
    wrong = [f"one request made jobs {sorted(ids)}" for ids in made.values() if len(ids) != 1]
    if len(listed) != num_jobs:
        wrong.append(f"{num_jobs} requests made {len(listed)} jobs")
    world.control.signal(signal.SIGCONT, "continue")
    return wrong, num_jobs


SCENARIO = Scenario(name="deadlines", promises=("R28",), num_trials=6, trial_seconds=60.0, run=run)
