"""Engines that wait for runs: where there is one, who gets it, and what it never does. Real shims, the stub engine."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gpu_service.devices import Device
from gpu_service.runs import spares
from gpu_service.runs.engine import Engine
from gpu_service.runs.engine_directories import EngineSettings, keep_context, read_context
from gpu_service.runs.engine_pool import EnginePool
from gpu_service.runs.shim_client import Message
from gpu_service.runs.spares import SpareKeeper
from gpu_service.shim.configuration import EngineConfiguration
from gpu_service.shim.records import ExitRecord, ShimRecord
from tests.fakes.gpu_runs import STUB_COMMAND, ShimConnection, child_environment, processes_of, wait_for, wait_until
from tests.fakes.gpu_server import GpuServer
from tunesmith.common.v1 import event_pb2

GIB = 1 << 30
CPU = Device(index=-1, type="cpu", name="cpu", total_memory_bytes=GIB, free_memory_bytes=GIB)
GPU = Device(index=0, type="cuda", name="a GPU", total_memory_bytes=80 * GIB, free_memory_bytes=79 * GIB)
WANTED = {"base_model": "org/name", "weights_digest": "w", "quantization": "nf4"}


class Node:
    """A pool with a keeper over devices as the test says."""

    def __init__(self, root: Path, *devices: Device, spare_engines: int | None = 1, idle_seconds: float = 300) -> None:
        (root / "engines").mkdir(exist_ok=True)
        self.devices: Sequence[Device] = devices
        self.held: set[str] = set()
        self.pool = EnginePool(
            directory=root / "engines",
            settings=EngineSettings(
                command=STUB_COMMAND,
                orphan_limit_seconds=300,
                grace_seconds=20,
                idle_seconds=idle_seconds,
                hang_limit_seconds=600,
                spare_engines=spare_engines,
                kernels_directory=root / "kernels",
            ),
        )
        self.keeper = SpareKeeper(pool=self.pool, devices=self._list, is_free=lambda name: name not in self.held)

    async def _list(self) -> Sequence[Device]:
        return self.devices

    def engine(self, device: Device) -> Engine | None:
        return self.pool.engine_on(device.id)

    async def get_spare(self, device: Device, *, then: Device | None = None) -> Engine:
        """The device's spare; `then` is what the device is like from the spare's start on."""
        async with self.pool._changing[device.id]:
            await self.keeper.look()
            self.devices = self.devices if then is None else (then,)
        engine = await wait_until(lambda: self.engine(device))
        assert isinstance(engine, Engine)
        return engine


@pytest.fixture(autouse=True)
def _children_find_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path, CPU)
    yield node
    await node.keeper.end()
    await node.pool.shut_down(20)


async def test_a_spare_takes_the_next_run_whatever_its_base(node: Node) -> None:
    spare = await node.get_spare(CPU)
    assert spare.is_spare
    assert await node.pool.acquire(CPU, WANTED) is spare
    spare.resident = {"base_model": "org/other", "weights_digest": "v", "bytes": 5}
    # One that keeps another base has imported everything too, and drops that base.
    assert await node.pool.acquire(CPU, WANTED) is spare
    assert node.pool.resident_bytes(CPU.id) == 5
    await node.keeper.look()
    assert len(list((spare.directory.parent).iterdir())) == 1


async def test_a_spare_knows_its_device_and_where_kernels_are_kept(node: Node, tmp_path: Path) -> None:
    node.pool.settings.recent_model.directory = "/models/org/name"
    spare = await node.get_spare(CPU)
    environment = EngineConfiguration.read(spare.directory).environment
    assert environment["TUNESMITH_ENGINE_DEVICE"] == "cpu:-1"
    assert environment["TUNESMITH_ENGINE_MODEL"] == "/models/org/name"
    assert environment["TRITON_CACHE_DIR"] == str(tmp_path / "kernels")


@pytest.mark.parametrize(("spare_engines", "wanted"), [(0, set()), (1, {"cpu:-1", "cuda:0"}), (None, {"cuda:0"})])
async def test_who_has_one(tmp_path: Path, spare_engines: int | None, wanted: set[str]) -> None:
    node = Node(tmp_path, CPU, GPU, spare_engines=spare_engines)
    await node.keeper.look()
    await wait_until(lambda: set(node.pool._engines) == wanted)
    await node.keeper.end()
    assert set(node.pool._engines) == wanted
    await node.keeper.dismiss()
    assert not node.pool._engines
    await node.pool.shut_down(20)


async def test_none_where_a_run_or_a_quarantine_is_or_the_node_drains(node: Node, tmp_path: Path) -> None:
    node.held = {CPU.id}
    await node.keeper.look()
    node.held = set()
    node.devices = (replace(CPU, quarantine_reason="broken"),)
    await node.keeper.look()
    node.devices = (CPU,)
    await node.keeper.end()
    await node.keeper.look()
    assert list((tmp_path / "engines").iterdir()) == []


async def test_the_device_may_be_taken_while_a_spare_waits_to_be_started(node: Node) -> None:
    lock = node.pool._changing[CPU.id]
    starting: asyncio.Task[Engine | None]
    async with lock:
        starting = asyncio.create_task(node.pool.start_spare(CPU, lambda: CPU.id not in node.held))
        await asyncio.sleep(0)
        node.held = {CPU.id}
    assert await starting is None


async def test_what_a_spare_holds_of_a_gpu_counts_as_free(tmp_path: Path) -> None:
    node = Node(tmp_path, GPU)
    spare = await node.get_spare(GPU, then=replace(GPU, free_memory_bytes=GPU.free_memory_bytes - GIB // 2))
    await wait_until(lambda: spare.context_bytes)
    assert node.pool.resident_bytes(GPU.id) == GIB // 2
    await node.keeper.end()
    await node.pool.shut_down(20)
    assert node.pool.resident_bytes(GPU.id) == 0


async def test_a_spare_that_was_ready_before_anybody_listened_is_known_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path, GPU)
    ready: list[str] = []
    node.pool.on_ready = lambda engine: ready.append(engine.id)
    connect = Engine.connect

    async def connect_late(engine: Engine) -> Message:
        other = await asyncio.to_thread(ShimConnection, engine.directory)
        await wait_until(lambda: other.status()["state"] == "idle")
        other.close()
        return await connect(engine)

    monkeypatch.setattr(Engine, "connect", connect_late)
    spare = await node.get_spare(GPU)
    await node.keeper.end()
    assert ready == [spare.id]
    await node.pool.shut_down(20)


async def test_what_an_adopted_spare_holds_of_a_gpu_counts_as_free(tmp_path: Path) -> None:
    node = Node(tmp_path, GPU)
    spare = await node.get_spare(GPU, then=replace(GPU, free_memory_bytes=GPU.free_memory_bytes - GIB // 2))
    await wait_until(lambda: (spare.directory / "context.json").exists())
    # Its server ends; the next one finds the spare and knows what it holds.
    await node.keeper.end()
    await node.pool.leave_alone()
    heir = EnginePool(directory=tmp_path / "engines", settings=node.pool.settings)
    await heir.adopt({})
    adopted = heir.engine_on(GPU.id)
    assert adopted is not None
    assert adopted.id == spare.id
    assert heir.resident_bytes(GPU.id) == GIB // 2
    await heir.shut_down(20)
    assert heir.resident_bytes(GPU.id) == 0


async def test_what_an_adopted_spare_took_before_it_was_adopted_is_not_guessed(tmp_path: Path) -> None:
    """It warmed up when its server was killed; how much was free before is not known to the next one."""
    node = Node(tmp_path, GPU)
    spare = await node.get_spare(GPU)
    await wait_until(lambda: (spare.directory / "context.json").exists())
    await node.keeper.end()
    await node.pool.leave_alone()
    (spare.directory / "context.json").unlink()
    heir = Node(tmp_path, GPU)
    await heir.pool.adopt({})
    await heir.keeper.look()
    adopted = heir.engine(GPU)
    assert adopted is not None
    assert heir.pool.on_ready is not None
    heir.pool.on_ready(adopted)
    await heir.keeper.end()
    await heir.keeper.dismiss()
    assert not (spare.directory / "context.json").exists()
    await heir.pool.shut_down(20)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"context_bytes": "x"}'])
def test_a_context_that_cannot_be_read_is_not_known(tmp_path: Path, content: str) -> None:
    assert read_context(tmp_path) == 0
    keep_context(tmp_path, 5)
    assert read_context(tmp_path) == 5
    (tmp_path / "context.json").write_text(content)
    assert read_context(tmp_path) == 0


async def test_an_idle_spare_stays_and_an_idle_base_goes(tmp_path: Path) -> None:
    node = Node(tmp_path, CPU, idle_seconds=0)
    spare = await node.get_spare(CPU)
    await node.pool.retire()
    assert not spare.leaving
    spare.resident = {"base_model": "org/name", "bytes": 5}
    await node.pool.retire()
    await wait_until(lambda: node.engine(CPU) is None)
    assert processes_of(spare.directory) == []
    again = await node.get_spare(CPU)
    assert again is not spare
    await node.keeper.end()
    await node.pool.shut_down(20)


async def test_what_a_spare_takes_while_it_comes_up_is_not_missed(tmp_path: Path) -> None:
    node = Node(tmp_path, GPU)
    with_context = replace(GPU, free_memory_bytes=GPU.free_memory_bytes - GIB // 2)
    async with node.pool._changing[GPU.id]:
        await node.keeper.look()
        # Looked at again before the pool knows of the one that is on its way.
        node.devices = (with_context,)
        await node.keeper.look()
    spare = await wait_until(lambda: node.engine(GPU))
    await wait_until(lambda: spare.context_bytes)
    assert spare.context_bytes == GIB // 2
    await node.keeper.end()
    await node.pool.shut_down(20)


async def test_an_adopted_spare_leaves_although_nobody_looked(tmp_path: Path) -> None:
    before = Node(tmp_path, CPU)
    spare = await before.get_spare(CPU)
    await before.keeper.end()
    await before.pool.leave_alone()
    after = Node(tmp_path, CPU)
    await after.pool.adopt({})
    adopted = after.engine(CPU)
    assert adopted is not None
    assert adopted.is_spare
    await after.keeper.end()
    await after.keeper.dismiss()
    assert after.engine(CPU) is None
    assert processes_of(spare.directory) == []
    await after.pool.shut_down(20)


async def test_one_spare_that_takes_its_time_keeps_no_other_from_leaving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path, CPU, GPU)
    await node.keeper.look()
    await wait_until(lambda: len(node.pool._engines) == 2)
    both = asyncio.Barrier(2)

    async def make_room(device_id: str) -> None:
        await both.wait()

    monkeypatch.setattr(node.pool, "make_room", make_room)
    await node.keeper.end()
    async with asyncio.timeout(15):
        await node.keeper.dismiss()
    assert not both.n_waiting
    await node.pool.shut_down(20)


async def test_one_that_does_not_come_up_is_not_started_again_and_again(node: Node) -> None:
    spare = await node.get_spare(CPU)
    record = ShimRecord.read(spare.directory)
    assert record is not None
    os.kill(record.engine_pid, signal.SIGKILL)
    await wait_until(lambda: node.engine(CPU) is None)
    await node.keeper.look()
    await node.keeper.end()
    assert len(list(spare.directory.parent.iterdir())) == 1
    ending = ExitRecord.read(spare.directory)
    assert ending is not None
    assert ending.signal == signal.SIGKILL


async def test_a_spare_that_neither_comes_up_nor_ends_keeps_no_server_from_stopping(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spares, "_LAST_START_SECONDS", 0.01)
    begun, never = asyncio.Event(), asyncio.Event()

    async def start_spare(device: Device, is_free: Callable[[], bool]) -> Engine | None:
        begun.set()
        await never.wait()
        return None

    monkeypatch.setattr(node.pool, "start_spare", start_spare)
    await node.keeper.look()
    async with asyncio.timeout(30):
        await begun.wait()
        await node.keeper.end()
        await node.keeper.dismiss()
    never.set()


def test_a_node_trains_on_its_spare_and_has_another_behind_a_failure(tmp_path: Path) -> None:
    server = GpuServer(tmp_path, spare_engines=1)
    try:
        server.start()
        (first,) = wait_for(lambda: server.shims())
        server.start_run()
        assert server.watch_to_end()[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED
        assert [shim["shim_pid"] for shim in server.shims()] == [first["shim_pid"]]
        # Without a run before, the newest model that is there.
        assert _environment(server)["TUNESMITH_ENGINE_MODEL"] == str(server.models_directory / "org/name")
        # Taken over with its spare by the server that comes next.
        server.kill()
        server.start()
        server.start_run("01JOC", script={"fail_at_step": 1})
        assert server.watch_to_end("01JOC")[-1].run_state.state == event_pb2.RUN_STATE_FAILED
        wait_for(lambda: [shim for shim in server.shims() if shim["shim_pid"] != first["shim_pid"]])
        assert not psutil.pid_exists(first["engine_pid"])
        # The one behind it expects another run on the same base.
        assert _environment(server)["TUNESMITH_ENGINE_MODEL"] == str(server.models_directory / "org/name")
        assert server.terminate() == 0
        assert server.living_processes() == []
    finally:
        server.clean_up()


def test_an_adopted_engine_that_had_work_is_no_spare_that_was_lost(tmp_path: Path) -> None:
    server = GpuServer(tmp_path, spare_engines=1)
    try:
        server.start()
        server.start_run()
        assert server.watch_to_end()[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED
        server.kill()
        server.start()
        (engine,) = server.shims()
        os.kill(engine["engine_pid"], signal.SIGKILL)
        # At once, and not after the pause behind one that does not come up.
        wait_for(lambda: [shim for shim in server.shims() if shim["shim_pid"] != engine["shim_pid"]])
        assert "spare-lost" not in (server.root / "server.log").read_text()
    finally:
        server.clean_up()


def _environment(server: GpuServer) -> Mapping[str, str]:
    """Of the newest engine."""
    newest = max(server.engine_directories(), key=lambda directory: (directory / "engine.json").stat().st_mtime_ns)
    return EngineConfiguration.read(newest).environment


def test_a_spare_leaves_with_a_server_that_keeps_engines(tmp_path: Path) -> None:
    server = GpuServer(tmp_path, spare_engines=1, keep_engines=True)
    try:
        server.start()
        wait_for(lambda: server.shims())
        assert server.terminate() == 0
        assert server.living_processes() == []
    finally:
        server.clean_up()
