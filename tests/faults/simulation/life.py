"""One life of control: its real core over the durable tables, ended at once when the simulation says so.

Whatever of a dead life still runs can touch nothing: every port asks first whether it is alive.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from control_service.app.collector import CollectorConfig
from control_service.app.node_monitor import NodeMonitorConfig
from control_service.app.runtime import Runtime, RuntimeConfig
from control_service.app.store_ports import CommitNotice
from control_service.domain.errors import Unavailable
from control_service.domain.ids import UlidSource
from tests.fakes.control_blobs import MemoryBlobStore
from tests.fakes.control_codec import PickleCodec
from tests.faults.simulation.invariants import Broken, hold
from tests.faults.simulation.link import SimClient, Weather
from tests.faults.simulation.memory_store import MemoryTransaction, Tables
from tests.faults.simulation.node import SimNode
from tests.faults.simulation.sql_shadow import SqlShadow
from tests.faults.simulation.virtual_loop import VirtualLoop

T = TypeVar("T")

CONFIG = RuntimeConfig(
    nodes=NodeMonitorConfig(lease_seconds=30.0, heartbeat_seconds=10.0, capabilities_refresh_seconds=60.0),
    collector=CollectorConfig(pause_seconds=0.5),
)


class Dead(BaseException):
    """The process ended in the middle of this; nobody may catch it."""


class WallClock:
    """A machine's clocks: they run at `rate` of true time, and the time of day is set wrong by `jump`. Outlives lives
    of control."""

    def __init__(self, loop: VirtualLoop, *, rate: float = 1.0) -> None:
        self._loop = loop
        self.rate = rate
        self._offset = timedelta(0)
        self._steady_offset = timedelta(0)

    def begin_process(self) -> None:
        """A new process takes the time of day as it is now."""
        self._steady_offset = self._offset

    def jump(self, seconds: float) -> None:
        self._offset += timedelta(seconds=seconds)

    def utc_now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self.monotonic_seconds()) + self._offset

    def steady_utc_now(self) -> datetime:
        return self.utc_now() - self._offset + self._steady_offset

    def monotonic_seconds(self) -> float:
        return self._loop.time() * self.rate

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self.rate)


@dataclass
class Disk:
    """Control's machine: what is durable, and how the disk behaves."""

    tables: Tables
    blobs: MemoryBlobStore
    clock: WallClock
    dice: random.Random
    on_commit: Callable[[], None]
    on_broken: Callable[[Broken], None]
    trace: Callable[[str], None]
    refuses: bool = False
    # Does all transactions a second time in the real database.
    shadow: SqlShadow | None = None
    # Commits until control dies, before (True) or after it; 0: it does not.
    dies_after_commits: int = 0
    dies_before: bool = False


class Life:
    """Built with a running loop. `die` is the crash; after it `end` clears what is left in memory."""

    def __init__(self, disk: Disk, nodes: list[SimNode], weather: dict[str, Weather], codec: PickleCodec) -> None:
        self.alive = True
        self.died = asyncio.Event()
        self.store = LifeStore(disk, self)
        self.blobs: Any = _Guarded(disk.blobs, self.check)
        self.clock = disk.clock
        self.clock.begin_process()
        self.codec = codec
        self.ids = UlidSource(
            lambda: int(disk.clock.utc_now().timestamp() * 1000),
            newest=max(disk.tables.jobs, default=""),
            random_bits=disk.dice.getrandbits,
        )
        self._nodes = {node.name: node for node in nodes}
        self._weather = weather
        self.runtime = Runtime(
            store=self.store, dialer=self, codec=codec, blobs=self.blobs, clock=disk.clock, config=CONFIG
        )

    def check(self) -> None:
        """Raises Dead after the crash."""
        if not self.alive:
            raise Dead

    def die(self) -> None:
        """The process ends here and now."""
        self.alive = False
        self.died.set()

    def dial(self, *, name: str, address: str, installation_id: str) -> Any:
        """Implements `NodeDialer`."""
        # A lease begins anew with every connection.
        self._weather[name].heard()
        return SimClient(self._nodes[name], self._weather[name], installation_id=installation_id, life=self.check)


class LifeStore:
    """Implements `Store`: in order, each after a moment, all or nothing, and durable before it answers."""

    installation_id = "installation"

    def __init__(self, disk: Disk, life: Life) -> None:
        self._disk = disk
        self._life = life
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Callable[[CommitNotice], None]] = []
        self._free_at = 0.0

    def subscribe(self, listener: Callable[[CommitNotice], None]) -> None:
        self._listeners.append(listener)

    async def transact(self, work: Callable[[Any], T]) -> T:
        self._life.check()
        answer: asyncio.Future[T] = self._loop.create_future()
        # One writer: in the order of the calls, also when the caller goes away.
        self._free_at = max(self._free_at, self._loop.time()) + self._disk.dice.uniform(0.0005, 0.01)
        self._loop.call_at(self._free_at, self._commit, work, answer)
        return await answer

    async def read(self, work: Callable[[Any], T]) -> T:
        self._life.check()
        await asyncio.sleep(self._disk.dice.uniform(0.0001, 0.003))
        self._life.check()
        self._refuse()
        return work(MemoryTransaction(self._disk.tables))

    def _refuse(self) -> None:
        if self._disk.refuses:
            raise Unavailable("STORE_UNAVAILABLE", "the disk refuses", retry_after_seconds=1.0)

    def _commit(self, work: Callable[[Any], Any], answer: asyncio.Future[Any]) -> None:
        if not self._life.alive:
            return
        disk = self._disk
        tx = MemoryTransaction(disk.tables)
        try:
            self._refuse()
            before = self._dice_state()
            result = work(tx)
        except Exception as error:  # noqa: BLE001 - a store's boundary: raised again where the caller awaits
            tx.roll_back()
            if not disk.refuses:
                self._repeat(work, before, refused=getattr(error, "reason", ""))
            if not answer.done():
                answer.set_exception(error)
            return
        touched = tx.job_sequences or tx.moved_jobs or tx.nodes_changed
        dies = False
        if touched and disk.dies_after_commits:
            disk.dies_after_commits -= 1
            dies = disk.dies_after_commits == 0
        if dies and disk.dies_before:
            tx.roll_back()
            self._life.die()
            return
        self._repeat(work, before)
        disk.on_commit()
        if dies:
            self._life.die()
            return
        if touched:
            notice = CommitNotice(
                job_sequences=tx.job_sequences,
                jobs_changed=tx.jobs_changed,
                nodes_changed=tx.nodes_changed,
                moved_jobs=frozenset(tx.moved_jobs),
            )
            for listener in self._listeners:
                listener(notice)
        if not answer.done():
            answer.set_result(result)

    def _dice_state(self) -> Any:
        # Only a shadow needs it: ids that are made in a transaction are to be the same in both stores.
        return None if self._disk.shadow is None else (self._disk.dice.getstate(), dict(vars(self._life.ids)))

    def _repeat(self, work: Callable[[Any], Any], before: Any, *, refused: str = "") -> None:
        shadow = self._disk.shadow
        if shadow is None:
            return
        after = self._dice_state()
        self._set_dice(before)
        found = shadow.repeat(work)
        self._set_dice(after)
        try:
            hold(found == refused, f"the database said {found!r}, the store in memory {refused!r}")
            shadow.compare(self._disk.tables)
        except Broken as broken:
            self._disk.on_broken(broken)

    def _set_dice(self, state: Any) -> None:
        self._disk.dice.setstate(state[0])
        vars(self._life.ids).update(state[1])


class _Guarded:
    """Passes calls on while control is alive."""

    def __init__(self, target: object, check: Callable[[], None]) -> None:
        self._target = target
        self._check = check

    def __getattr__(self, name: str) -> Any:
        self._check()
        return getattr(self._target, name)
