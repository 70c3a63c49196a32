"""The memory prober with a scripted planner and probe: what works beside it, and what a cancel leaves."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gpu_service.devices import Device
from gpu_service.domain.memory import MemoryLedger
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.memory_records import MemoryRecords
from gpu_service.runs.models import ModelShelf
from gpu_service.runs.node_files import NodeFiles
from gpu_service.runs.planner_process import PlannerProcess
from gpu_service.runs.planning import Planning
from gpu_service.runs.probing import MemoryProber
from gpu_service.shim import durable_json
from tests.fakes.datasets import make_spec, write_blob
from tests.fakes.gpu_runs import wait_until
from tests.fakes.tiny_models import place_header_only

CPU = Device(index=-1, type="cpu", name="cpu", total_memory_bytes=1 << 34, free_memory_bytes=1 << 34)
LIMIT_SECONDS = 20.0
# Says that it began, and answers when it may.
PROBE = """
import json, pathlib, sys, time
directory = pathlib.Path(sys.argv[1])
(directory / "began").touch()
while not (directory.parent / "go").exists():
    time.sleep(0.01)
print(json.dumps({"type": "measured", "peak_bytes": 7, "step_tokens": 2, "longest_tokens": 1}))
"""


class ScriptedPlanner(PlannerProcess):
    """Plans at once, into a file; a cache keeper gets in line meanwhile."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory
        self.keeper: asyncio.Task[None] | None = None
        self.keeper_was_in = asyncio.Event()

    async def ask(self, request: Mapping[str, Any], *, answer: str) -> dict[str, Any]:
        """See the real one."""

        async def keep() -> None:
            async with self.at_rest():
                self.keeper_was_in.set()

        self.keeper = asyncio.create_task(keep())
        await asyncio.sleep(0)
        plan = {"memory": {"analytic_bytes": "5", "peak_bytes": "6", "host_bytes": "0"}}
        (self._directory.parent / "plan.json").write_text(json.dumps(plan))
        return {"plan_directory": str(self._directory.parent)}


class Node:
    """A prober over real files."""

    def __init__(self, root: Path) -> None:
        files = NodeFiles(root / "node", root / "models")
        files.prepare()
        place_header_only(files.models, name="org/name")
        dataset = write_blob(files.blobs, 1, [{"prompt": "a", "completion": "b"}] * 4, "prompt-completion")
        self.spec = make_spec([dataset], base_model="org/name", training_type="lora")
        self.requests = files.requests
        self.planner = ScriptedPlanner(files.requests)
        memory = MemoryRecords(files.memory_records)
        self.prober = MemoryProber(
            planning=Planning(
                files=files,
                models=ModelShelf(files.models, cache_file=files.cache / "digests.json"),
                blobs=BlobStore(files.blobs),
                planner=self.planner,
                versions={},
                memory=memory,
            ),
            ledger=MemoryLedger(),
            records=memory,
            directory=files.requests,
            make_room=self._make_room,
            on_release=lambda: None,
            command=(sys.executable, "-c", PROBE),
        )
        self.kept_while_room_was_made = False

    async def _make_room(self, _device_id: str) -> None:
        # Far more turns of the loop than who waits for the planner's place needs to get it.
        for _ in range(20):
            await asyncio.sleep(0)
        self.kept_while_room_was_made = self.planner.keeper_was_in.is_set()

    async def until_began(self) -> None:
        """Wait for the probe's process."""
        await wait_until(lambda: bool(list(self.requests.glob("probe-*/began"))))


async def test_the_cache_is_left_alone_from_the_plan_to_the_end_of_the_probe_and_a_look_at_rows_goes_on(
    tmp_path: Path,
) -> None:
    node = Node(tmp_path)
    probing = asyncio.create_task(node.prober.plan_and_probe(node.spec, CPU))
    await node.until_began()
    assert not node.kept_while_room_was_made
    async with asyncio.timeout(LIMIT_SECONDS), node.planner.turn(short=True):
        assert not node.planner.keeper_was_in.is_set()
    (node.requests / "go").touch()
    assert (await probing)["memory_probe"]["peak_bytes"] == "7"
    assert node.planner.keeper is not None
    await asyncio.wait_for(node.planner.keeper, LIMIT_SECONDS)


async def test_a_cancel_while_the_request_is_being_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path)
    loop = asyncio.get_running_loop()
    write, tasks = durable_json.write, list[asyncio.Task[Any]]()

    def write_after_the_cancel(path: Path, content: Mapping[str, Any]) -> None:
        if path.name == "run.json":
            asyncio.run_coroutine_threadsafe(_cancel(tasks[0]), loop).result(LIMIT_SECONDS)
            path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content)

    monkeypatch.setattr(durable_json, "write", write_after_the_cancel)
    tasks.append(asyncio.create_task(node.prober.plan_and_probe(node.spec, CPU)))
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    await loop.shutdown_default_executor()
    assert list(node.requests.iterdir()) == []


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    # What the cancelled call does next, it does before the thread goes on, but for what would wait for that.
    await asyncio.wait([task], timeout=0.2)
