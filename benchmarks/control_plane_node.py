"""A GPU node for the control plane's benchmark: a process whose runs write real journals at a pace, and train nothing.

`python -m benchmarks.control_plane_node '{"directory": "/tmp/x"}'` prints `{"address": "host:port"}`; a line
`{"rate": 1000}` on standard input lets its runs do so many steps a second, `{"burst": 5000}` that many at once.
Journals are written by the journal's own writer and served by the GPU service's own `Run`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from gpu_service.api.server_options import SERVER_OPTIONS
from gpu_service.api.wire import records_to_wire
from gpu_service.journal import Writer
from gpu_service.runs.run import Run
from tests.fakes.gpu_node import FakeGpuNode, FakeRun
from tests.fakes.run_script import opening_payloads
from tunesmith.common.v1 import event_pb2
from tunesmith.gpu.v1 import run_service_pb2

_NUM_STEPS = 1_000_000_000
_TICK_SECONDS = 0.001


class Pace:
    """How many steps every run may have done by now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since, self._done, self._rate = time.monotonic(), 0.0, 0.0

    def set_rate(self, rate: float) -> None:
        with self._lock:
            self._done, self._since, self._rate = self._count(), time.monotonic(), rate

    def add(self, number: int) -> None:
        with self._lock:
            self._done += number

    def allowed(self) -> int:
        with self._lock:
            return int(self._count())

    def _count(self) -> float:
        return self._done + (time.monotonic() - self._since) * self._rate


class JournalNode(FakeGpuNode):
    """A fake node but for its journals, and for how they are followed."""

    def __init__(self, directory: Path) -> None:
        super().__init__(name="bench", num_steps=_NUM_STEPS)
        self.server_options = SERVER_OPTIONS
        self.pace = Pace()
        self._directory = directory
        self._followed: dict[str, Run] = {}

    async def WatchRun(  # noqa: N802
        self, request: run_service_pb2.WatchRunRequest, context: Any
    ) -> AsyncIterator[run_service_pb2.WatchRunResponse]:
        async for records in self._followed[request.key.job_id].follow(request.after_run_sequence):
            yield records_to_wire(records)

    async def _play(self, fake: FakeRun) -> None:
        key = fake.run.key
        directory = self._directory / f"{key.job_id}-{key.attempt}"
        directory.mkdir(parents=True)
        device = {"type": "cpu", "index": -1}
        content = {"installation_id": key.installation_id, "job_id": key.job_id, "attempt": key.attempt}
        content |= {"spec_digest": "", "weights_digest": "", "device": device, "spec": {}}
        run = self._followed[key.job_id] = Run(directory=directory, content=content, on_change=lambda: None)
        fake.run.state = event_pb2.RUN_STATE_RUNNING
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._write, args=(directory / "journal", key.attempt, run, loop), daemon=True).start()
        await self._wake()

    def _write(self, path: Path, attempt: int, run: Run, loop: asyncio.AbstractEventLoop) -> None:
        """As an engine does: an append for each step, and a notice."""
        writer = Writer(path, attempt=attempt)
        for payload in opening_payloads(num_steps=_NUM_STEPS, resume_step=0):
            writer.append(payload)
        loop.call_soon_threadsafe(run.wake)
        step, base = 0, self.pace.allowed()
        while True:
            allowed = self.pace.allowed() - base
            if step == allowed:
                time.sleep(_TICK_SECONDS)
                continue
            while step < allowed:
                step += 1
                writer.append(_step(step))
            loop.call_soon_threadsafe(run.wake)


def _step(step: int) -> event_pb2.EventPayload:
    """What a training loop says of a step."""
    return event_pb2.EventPayload(
        step=event_pb2.StepEvent(
            step=step,
            total_steps=_NUM_STEPS,
            epoch=step / _NUM_STEPS,
            loss=4.0 / step,
            learning_rate=2e-4,
            gradient_norm=1.0,
            num_tokens=8192,
            num_target_tokens=6000,
            tokens_per_second=36_000.0,
            step_seconds=0.2,
            peak_memory_bytes=2**33,
            remaining_seconds=100.0,
            num_examples=8,
        )
    )


async def _main(directory: Path) -> None:
    node = JournalNode(directory)
    await node.start()
    sys.stdout.write(json.dumps({"address": node.address}) + "\n")
    sys.stdout.flush()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        if "rate" in order:
            node.pace.set_rate(float(order["rate"]))
        node.pace.add(int(order.get("burst", 0)))
    await node.close()


if __name__ == "__main__":
    asyncio.run(_main(Path(json.loads(sys.argv[1])["directory"])))
