"""The callers of the control plane's benchmark, in a process of their own: unary calls, or watchers of a job.

`python -m benchmarks.control_plane_load '<JSON of UnaryLoad or WatchLoad, with "kind">'`; the last line on standard
output is what was seen. Judges nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from benchmarks.control_plane_echo import METHOD as ECHO
from tunesmith.common.v1 import training_spec_pb2
from tunesmith.control.v1 import job_service_pb2 as jobs
from tunesmith.control.v1 import project_service_pb2 as projects

_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 16 * 1024 * 1024))
_WATCHES_A_CHANNEL = 16
_OPENED_TOGETHER = 50


@dataclass(frozen=True, kw_only=True)
class UnaryLoad:
    """Calls of one kind: as many as go with `in_flight` at a time, or `per_second` at an even pace."""

    address: str
    call: str
    seconds: float
    in_flight: int = 64
    per_second: float = 0.0
    job_id: str = ""
    project_id: int = 0
    dataset_id: int = 0


@dataclass(frozen=True, kw_only=True)
class WatchLoad:
    """Watchers of one job. `until_sequence` > 0: each ends there; else all end when standard input does."""

    address: str
    job_id: str
    num_watchers: int
    until_sequence: int = 0
    after_sequence: int = 0
    # The others take their messages as bytes: what a client decodes is its own affair, and this process is one of two.
    num_decoding: int = 1_000_000


@dataclass
class Watched:
    """What watchers saw. `oldest_seconds`: of every message with events, the age of its first event."""

    num_events: int = 0
    num_messages: int = 0
    seconds: float = 0.0
    oldest_seconds: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


_numbers = itertools.count(time.time_ns())


def _create_project(load: UnaryLoad) -> projects.CreateProjectRequest:
    number = next(_numbers)
    trait = training_spec_pb2.Trait(
        trait_type="reasoning", datasets=[training_spec_pb2.TraitDataset(dataset_id=load.dataset_id, percentage=100)]
    )
    project = projects.Project(
        name=f"project {number}",
        base_model="org/tiny",
        model_type="llama",
        training_type="qlora",
        output_directory="./output/test",
        traits=[trait],
    )
    return projects.CreateProjectRequest(project=project, request_id=f"request-{number}")


@dataclass(frozen=True, kw_only=True)
class _Call:
    method: str
    request: Callable[[UnaryLoad], Any]
    response: Any


_CALLS = {
    "echo": _Call(method=ECHO, request=lambda _: jobs.GetJobRequest(job_id="0" * 26), response=jobs.GetJobRequest),
    "GetJob": _Call(
        method="/tunesmith.control.v1.JobService/GetJob",
        request=lambda load: jobs.GetJobRequest(job_id=load.job_id),
        response=jobs.GetJobResponse,
    ),
    "GetProject": _Call(
        method="/tunesmith.control.v1.ProjectService/GetProject",
        request=lambda load: projects.GetProjectRequest(project_id=load.project_id),
        response=projects.GetProjectResponse,
    ),
    "ListProjects": _Call(
        method="/tunesmith.control.v1.ProjectService/ListProjects",
        request=lambda _: projects.ListProjectsRequest(page_size=10),
        response=projects.ListProjectsResponse,
    ),
    "ListJobs": _Call(
        method="/tunesmith.control.v1.JobService/ListJobs",
        request=lambda _: jobs.ListJobsRequest(page_size=50),
        response=jobs.ListJobsResponse,
    ),
    "Health": _Call(
        method="/grpc.health.v1.Health/Check",
        request=lambda _: health_pb2.HealthCheckRequest(),
        response=health_pb2.HealthCheckResponse,
    ),
    "CreateProject": _Call(
        method="/tunesmith.control.v1.ProjectService/CreateProject",
        request=_create_project,
        response=projects.CreateProjectResponse,
    ),
}


async def call_all(load: UnaryLoad) -> dict[str, Any]:
    """Makes the calls; their rate, and how long each took."""
    call = _CALLS[load.call]
    took: list[float] = []
    failed: list[str] = []
    async with grpc.aio.insecure_channel(load.address, options=_OPTIONS) as channel:
        stub = channel.unary_unary(
            call.method,
            request_serializer=type(call.request(load)).SerializeToString,
            response_deserializer=call.response.FromString,
        )

        async def once() -> None:
            started = time.perf_counter()
            try:
                await stub(call.request(load), timeout=60.0)
            except grpc.aio.AioRpcError as error:
                failed.append(f"{error.code().name}: {error.details()}")
            took.append(time.perf_counter() - started)

        await once()
        took.clear()
        started, cpu = time.perf_counter(), time.process_time()
        if load.per_second:
            await _paced(once, load)
        else:
            await _closed(once, load, until=started + load.seconds)
        seconds = time.perf_counter() - started
    assert not failed, failed[:3]
    took.sort()
    return {
        "calls": len(took),
        "per_second": len(took) / seconds,
        "p50_ms": took[len(took) // 2] * 1e3,
        "p99_ms": took[int(len(took) * 0.99)] * 1e3,
        "client_cpu_us": (time.process_time() - cpu) / len(took) * 1e6,
    }


async def _closed(once: Callable[[], Any], load: UnaryLoad, *, until: float) -> None:
    async def again() -> None:
        while time.perf_counter() < until:
            await once()

    await asyncio.gather(*(again() for _ in range(load.in_flight)))


async def _paced(once: Callable[[], Any], load: UnaryLoad) -> None:
    running: set[asyncio.Task[None]] = set()
    start = time.perf_counter()
    for number in range(int(load.seconds * load.per_second)):
        await asyncio.sleep(max(0.0, start + number / load.per_second - time.perf_counter()))
        task = asyncio.create_task(once())
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


async def _watch(load: WatchLoad, channel: Any, seen: Watched, number: int, opened: asyncio.Semaphore) -> None:
    decodes = number < load.num_decoding
    stream = channel.unary_stream(
        "/tunesmith.control.v1.JobService/WatchJob",
        request_serializer=jobs.WatchJobRequest.SerializeToString,
        response_deserializer=jobs.WatchJobResponse.FromString if decodes else None,
    )
    position = load.after_sequence
    async with opened:
        call = stream(jobs.WatchJobRequest(job_id=load.job_id, after_sequence=position))
        message = await call.read()
    while message is not grpc.aio.EOF:
        seen.num_messages += 1
        if decodes and (events := message.events):
            first = events[0]
            seen.oldest_seconds.append(time.time() - first.time.seconds - first.time.nanos * 1e-9)
            if first.sequence != position + 1 or events[-1].sequence != position + len(events):
                seen.problems.append(f"after {position} came {first.sequence} to {events[-1].sequence}")
            position += len(events)
            seen.num_events += len(events)
            if load.until_sequence and position >= load.until_sequence:
                call.cancel()
                return
        message = await call.read()


async def watch_all(load: WatchLoad) -> Watched:
    """Watches until the end, or until standard input ends."""
    seen, opened = Watched(), asyncio.Semaphore(_OPENED_TOGETHER)
    channels, tasks = [], []
    started = time.perf_counter()
    for number in range(load.num_watchers):
        if number % _WATCHES_A_CHANNEL == 0:
            channels.append(grpc.aio.insecure_channel(load.address, options=_OPTIONS))
        tasks.append(asyncio.create_task(_watch(load, channels[-1], seen, number, opened)))
    if load.until_sequence:
        await asyncio.gather(*tasks)
    else:
        while seen.num_messages < load.num_watchers:  # noqa: ASYNC110 - counted, not told
            await asyncio.sleep(0.05)
        sys.stdout.write(json.dumps({"open": load.num_watchers}) + "\n")
        sys.stdout.flush()
        await _line()
        seen.num_events = seen.num_messages = 0
        # What came while watchers were opened is nobody's measurement.
        seen.oldest_seconds.clear()
        started, cpu = time.perf_counter(), time.process_time()
        await _line()
        seen.seconds, seen.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        result = Watched(**asdict(seen))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return result
    seen.seconds, seen.cpu_seconds = time.perf_counter() - started, time.process_time()
    return seen


async def _line() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


async def _calls(orders: list[dict[str, Any]], *, together: bool) -> list[dict[str, Any]]:
    if together:
        return await asyncio.gather(*(call_all(UnaryLoad(**order)) for order in orders))
    return [await call_all(UnaryLoad(**order)) for order in orders]


def main() -> None:
    order = json.loads(sys.argv[1])
    if order.pop("kind") == "watch":
        result: Any = asdict(asyncio.run(watch_all(WatchLoad(**order))))
    else:
        result = asyncio.run(_calls(order["calls"], together=order.get("together", False)))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
