"""The engine pool with real shims, in this process: which engine it reuses, and what it does about a hung shim."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from gpu_service.devices import Device
from gpu_service.journal import summarize
from gpu_service.runs.engine_directories import KEPT_ENDED_ENGINES, EngineSettings, EngineStartFailed
from gpu_service.runs.engine_pool import EnginePool
from gpu_service.runs.quarantine import Quarantine
from gpu_service.runs.run import Run
from gpu_service.shim.closing import close_run
from gpu_service.shim.lock import hold, is_held
from gpu_service.shim.records import ExitRecord
from tests.fakes.gpu_runs import STUB_COMMAND, child_environment, processes_of, wait_until, write_run

CPU = Device(index=-1, type="cpu", name="cpu", total_memory_bytes=1 << 30, free_memory_bytes=1 << 30)
WANTED = {"base_model": "org/name", "weights_digest": "w", "quantization": "nf4"}


@pytest.fixture(autouse=True)
def _children_find_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])


def pool(
    directory: Path,
    *,
    answer_limit_seconds: float = 30,
    grace_seconds: float = 20,
    quarantine: Quarantine | None = None,
) -> EnginePool:
    directory.mkdir(exist_ok=True)
    settings = EngineSettings(
        command=STUB_COMMAND,
        orphan_limit_seconds=300,
        grace_seconds=grace_seconds,
        idle_seconds=300,
        hang_limit_seconds=600,
        answer_limit_seconds=answer_limit_seconds,
    )
    return EnginePool(directory=directory, settings=settings, quarantine=quarantine)


async def test_an_idle_engine_is_reused_for_the_same_base_only(tmp_path: Path) -> None:
    engines = pool(tmp_path / "engines")
    first = await engines.acquire(CPU, WANTED)
    first.resident = {"base_model": "org/name", "weights_digest": "w", "bytes": 5}
    assert await engines.acquire(CPU, WANTED) is first
    assert engines.resident_bytes(CPU.id) == 5
    second = await engines.acquire(CPU, {**WANTED, "weights_digest": "other"})
    assert second is not first
    assert ExitRecord.read(first.directory) is not None
    await engines.shut_down(20)
    assert processes_of(second.directory) == []


@pytest.mark.parametrize("place", ["shim.lock", "shim.json"])
async def test_an_engine_that_finds_no_room_for_its_files_is_named(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory found some; its shim does not. The run is told DISK_FULL, and waits for room as others do."""
    # The first file that a shim writes, or the last before it serves, on a disk that got full meanwhile; whoever
    # buries it finds room again.
    program = (
        "import errno, os, sys\n"
        "from pathlib import Path\n"
        "from gpu_service.shim import __main__ as process, lock, records\n"
        "def full(*arguments, **options): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "if '--bury' not in sys.argv:\n"
        "    process.hold = full if sys.argv[1] == 'shim.lock' else process.hold\n"
        "    records.durable_json.write_over = full\n"
        "sys.exit(process.main(sys.argv[2:]))\n"
    )
    monkeypatch.setattr("gpu_service.runs.shim_client._SHIM_COMMAND", (sys.executable, "-c", program, place))
    engines = pool(tmp_path / "engines")
    with pytest.raises(EngineStartFailed, match="No space left on device") as caught:
        await engines.acquire(CPU, WANTED)
    assert caught.value.ending.disk_full
    (directory,) = (tmp_path / "engines").iterdir()
    assert processes_of(directory) == []


async def test_an_engine_that_does_not_come_up_for_another_reason_is_not_said_to_want_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import sys; sys.exit(0 if '--bury' in sys.argv else 'no such shim')"
    monkeypatch.setattr("gpu_service.runs.shim_client._SHIM_COMMAND", (sys.executable, "-c", program))
    with pytest.raises(EngineStartFailed, match="no such shim") as caught:
        await pool(tmp_path / "engines").acquire(CPU, WANTED)
    assert not caught.value.ending.disk_full


async def test_room_is_made_only_when_an_engine_that_is_leaving_already_is_gone(tmp_path: Path) -> None:
    engines = pool(tmp_path / "engines")
    engine = await engines.acquire(CPU, WANTED)
    await engine.shut_down(20)
    await engines.make_room(CPU.id)
    assert processes_of(engine.directory) == []


async def test_a_shim_that_hangs_is_ended_and_buried_at_adoption(tmp_path: Path) -> None:
    former = pool(tmp_path / "engines")
    engine = await former.acquire(CPU, WANTED)
    shim_pid = (await engine.client.status())["shim_pid"]
    await former.leave_alone()
    os.kill(shim_pid, signal.SIGSTOP)
    await pool(tmp_path / "engines", answer_limit_seconds=0.2).adopt({})
    await wait_until(lambda: ExitRecord.read(engine.directory) is not None)
    assert processes_of(engine.directory) == []


async def test_an_engine_that_does_not_end_holds_up_neither_the_node_nor_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_service.runs.engine_pool._DYING_SECONDS", 0.2)
    former = pool(tmp_path / "engines")
    engine = await former.acquire(CPU, WANTED)
    run_directory = write_run(tmp_path, num_steps=1000, script={"hang": {"at": 2, "way": "sleep"}})
    content = {**json.loads((run_directory / "run.json").read_text()), "device": {"type": "cpu", "index": -1}}
    run = Run(directory=run_directory, content=content, on_change=lambda: None)
    await engine.start(run)
    await wait_until(lambda: summarize(run_directory / "journal").last_run_sequence > 0)
    shim_pid = (await engine.client.status())["shim_pid"]
    await former.leave_alone()
    os.kill(shim_pid, signal.SIGKILL)
    await wait_until(lambda: not is_held(engine.directory / "shim.lock"))

    left: list[Run] = []
    quarantine = Quarantine()
    engines = pool(tmp_path / "engines", answer_limit_seconds=0.2, quarantine=quarantine)
    engines.on_run_left = lambda run, ending: left.append(run)
    # As a burial does that waits for a process which the kernel keeps.
    with hold(engine.directory / "shim.lock"):
        await engines.adopt({str(run_directory): run})
        assert quarantine.reason(CPU.id)
        assert engines.engine_of(run) is not None
        assert not summarize(run_directory / "journal").is_over
        assert not left
    await wait_until(lambda: left == [run])
    await engines.leave_alone()
    assert run.is_over
    assert not quarantine.reason(CPU.id)
    assert processes_of(engine.directory) == []


async def test_a_connection_that_only_broke_is_made_again_and_what_was_missed_made_up_for(tmp_path: Path) -> None:
    engines = pool(tmp_path / "engines")
    left: list[Run] = []
    engines.on_run_left = lambda run, ending: left.append(run)
    engine = await engines.acquire(CPU, WANTED)
    directory = write_run(tmp_path)
    content = {**json.loads((directory / "run.json").read_text()), "device": {"type": "cpu", "index": -1}}
    run = Run(directory=directory, content=content, on_change=lambda: None)
    # The engine never got it, or is done with it: the shim says that it has none.
    engine.run = run
    first = engine.client
    await first.close()
    first.gone.set()
    await wait_until(lambda: left == [run])
    assert engine.run is None
    assert engine.client is not first
    assert (await engine.client.status())["state"] in ("starting", "idle")
    await engines.shut_down(20)


async def test_an_engine_that_hangs_behind_the_end_of_its_run_is_ended(tmp_path: Path) -> None:
    engines = pool(tmp_path / "engines", grace_seconds=0)
    left: list[Run] = []
    engines.on_run_left = lambda run, ending: left.append(run)
    engine = await engines.acquire(CPU, WANTED)
    directory = write_run(tmp_path)
    close_run(directory, ExitRecord(status=None, signal=None, phase="", run_directory=None, stop_mode="cancel"))
    content = {**json.loads((directory / "run.json").read_text()), "device": {"type": "cpu", "index": -1}}
    engine.run = Run(directory=directory, content=content, on_change=lambda: None)
    await engines.retire()
    assert not engine.leaving
    await engine.run.refresh()
    await engines.retire()
    await wait_until(lambda: left)
    assert processes_of(engine.directory) == []


async def test_only_the_newest_ended_engines_are_kept(tmp_path: Path) -> None:
    engines = pool(tmp_path / "engines")
    for number in range(KEPT_ENDED_ENGINES + 3):
        directory = tmp_path / "engines" / f"old-{number}"
        directory.mkdir()
        ExitRecord(status=0, signal=None, phase="", run_directory=None, stop_mode=None).write(directory)
        os.utime(directory, (number, number))
    await engines.adopt({})
    kept = sorted(path.name for path in (tmp_path / "engines").iterdir())
    assert len(kept) == KEPT_ENDED_ENGINES
    assert "old-0" not in kept
