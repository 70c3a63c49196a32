"""One schedule: users, nodes, network, clocks, disk and crashes, drawn from a seed; then calm, until all is over.

Who does what is elsewhere: `users`, `faults`, `scripts`, `lives`. Here they are put together, and judged.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog

from control_service.domain.dataset import Dataset
from control_service.domain.job_state import JobState
from control_service.domain.project import Project
from control_service.domain.run import RunState
from tests.fakes.control_blobs import MemoryBlobStore
from tests.fakes.control_codec import PickleCodec
from tests.fakes.control_core import draft
from tests.faults.simulation.faults import Faults
from tests.faults.simulation.invariants import Broken, Watch, check_end, hold
from tests.faults.simulation.life import Disk, WallClock
from tests.faults.simulation.link import Weather
from tests.faults.simulation.lives import Lives
from tests.faults.simulation.memory_store import Tables
from tests.faults.simulation.node import SimNode
from tests.faults.simulation.run import SimRun
from tests.faults.simulation.scripts import Scripts
from tests.faults.simulation.sql_shadow import SqlShadow
from tests.faults.simulation.trace import Trace
from tests.faults.simulation.users import Users
from tests.faults.simulation.virtual_loop import NothingWillHappen, VirtualLoop

_DATA = b'{"text": "row"}\n'
# Trouble ends here; then everything works, and this much later every job must be over.
_TROUBLE_SECONDS = 150.0
_CALM_SECONDS = 3600.0
# How fast the clocks of a machine may run, to true time. A lease bears any two of them; `docs/operations.md` says so.
_RATES = (0.5, 0.8, 1.0, 1.0, 1.25, 2.0)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a schedule came to. `trace` is empty unless it was asked for."""

    seed: int
    broken: str
    num_commits: int
    num_crashes: int
    num_restores: int
    num_attempts: int
    virtual_seconds: float
    digest: str
    trace: list[str] = field(default_factory=list)


class World:
    """Made inside its loop."""

    def __init__(self, seed: int, loop: VirtualLoop, *, traced: bool) -> None:
        self._loop = loop
        dice = random.Random(seed)
        codec = PickleCodec()
        self.trace = Trace(now_seconds=loop.time, codec=codec, is_kept=traced)
        clock = WallClock(loop, rate=dice.choice(_RATES))
        self.disk = Disk(
            tables=_tables(clock),
            blobs=MemoryBlobStore(),
            clock=clock,
            dice=dice,
            on_commit=self._committed,
            on_broken=self._note_broken,
            trace=self.trace,
        )
        self.disk.blobs.add(_DATA)
        self._scripts = Scripts(dice)
        self.nodes = [
            SimNode(
                name,
                num_devices=dice.choice((1, 1, 2)),
                dice=dice,
                script_of=self._scripts.draw,
                rate=dice.choice(_RATES),
                ahead_seconds=dice.choice((0.0, 0.0, -3600.0, 3600.0)),
            )
            for name in "abc"[: dice.choice((1, 2, 2, 3))]
        ]
        self._weather = {node.name: Weather(dice=dice, trace=self.trace) for node in self.nodes}
        self._heard_at: dict[str, float] = {}
        # As above, by the loop's time.
        self._told_at: dict[str, float] = {}
        for node in self.nodes:
            self._weather[node.name].heard = partial(self._heard, node.name)
        self.faults = Faults(
            disk=self.disk,
            nodes=self.nodes,
            weather=self._weather,
            loop=loop,
            trouble_seconds=_TROUBLE_SECONDS,
            on_restore=self._begin_anew,
        )
        self.lives = Lives(
            disk=self.disk, nodes=self.nodes, weather=self._weather, codec=codec, before_start=self.faults.restore
        )
        self._users = Users(
            lives=self.lives,
            disk=self.disk,
            nodes=self.nodes,
            poison=self._scripts.poison,
            trouble_seconds=_TROUBLE_SECONDS,
        )
        self.watch = Watch(
            num_devices={node.name: node.num_devices for node in self.nodes},
            now_seconds=loop.time,
            num_lives=lambda: self.lives.num_ended,
            on_dispatch=self._let_go,
            too_small_for={node.name: node.too_small_for for node in self.nodes},
            silence_seconds=lambda name: clock.rate * (self._awake_seconds() - self._heard_at.get(name, 0.0)),
            was_disturbed=lambda name: self._weather[name].disturbed_at >= self._told_at.get(name, 0.0),
            clock_rate=clock.rate,
        )
        self._broken: Broken | None = None

    def _awake_seconds(self) -> float:
        return self._loop.time() - self._loop.stopped_seconds

    def _let_go(self) -> None:
        for weather in self._weather.values():
            weather.let_go()

    def _heard(self, name: str) -> None:
        self._heard_at[name] = self._awake_seconds()
        self._told_at[name] = self._loop.time()

    # The schedule.

    async def run(self) -> None:
        """Raises Broken."""
        main = asyncio.current_task()
        assert main is not None
        self.lives.own(main)
        self.lives.spawn(self.lives.keep())
        works = (self._users.use(), self.faults.hurt(), self.faults.hurt())
        actors = [self.lives.spawn(work) for work in works]
        await asyncio.wait(actors)
        for actor in actors:
            actor.result()
        self._calm()
        ends_at = self._loop.time() + _CALM_SECONDS
        while not self._is_settled():
            self._raise_if_broken()
            hold(self._loop.time() < ends_at, f"after an hour of calm: {self._waiting()}")
            await self._users.resume_all()
            await asyncio.sleep(5.0)
        self._raise_if_broken()
        missing = self._users.acknowledged - self.disk.tables.jobs.keys()
        hold(not missing, f"acknowledged and gone: {sorted(missing)}")
        hold(len(self.disk.tables.jobs) <= len(self._users.requests), "a request made two jobs")
        check_end(self.disk.tables, self.nodes, self.disk.blobs.outputs)

    def _calm(self) -> None:
        self.trace("--- calm")
        self._scripts.is_calm = True
        self.faults.calm()

    def _begin_anew(self) -> None:
        """Control's machine was lost, and what it has is the backup's."""
        self.watch.begin_anew(self.disk.tables)
        self._users.begin_anew(self.disk.tables)
        self.trace.begin_anew(self.disk.tables)

    def _is_settled(self) -> bool:
        jobs_left = [job for job in self.disk.tables.jobs.values() if not job.is_over]
        return not jobs_left and not any(self._is_leftover(run) for node in self.nodes for run in node.runs.values())

    def _is_leftover(self, run: SimRun) -> bool:
        """Nodes keep only runs whose artifacts could not be collected."""
        job = self.disk.tables.jobs.get(run.request.key.job_id)
        return not (job and job.state is JobState.FAILED and job.run_state is RunState.SUCCEEDED and run.is_over)

    def _waiting(self) -> str:
        runs = [f"run {run.name} is {run.state} on {node.name}" for node in self.nodes for run in node.runs.values()]
        jobs_left = [
            f"{job.job_id} is {job.state} attempt {job.attempt} on {job.node!r}, run {job.run_state},"
            f" unreachable {job.node_unreachable}, not before {job.not_before}"
            for job in self.disk.tables.jobs.values()
            if not job.is_over
        ]
        return "; ".join([*runs, *jobs_left])

    def _committed(self) -> None:
        try:
            self.watch.committed(self.disk.tables, steady_now=self.disk.clock.steady_utc_now())
        except Broken as broken:
            self._note_broken(broken)
        self.trace.committed(self.disk.tables)

    def _note_broken(self, broken: Broken) -> None:
        self._broken = self._broken or broken

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    def digest(self) -> str:
        """Of every log, so that two runs of a seed can be compared."""
        total = hashlib.sha256()
        for job_id, events in sorted(self.disk.tables.events.items()):
            for event in events:
                total.update(f"{job_id[:10]} {event.sequence} {event.attempt} {event.kind}".encode())
        return total.hexdigest()[:16]


def _tables(clock: WallClock) -> Tables:
    tables = Tables()
    now = clock.utc_now()
    sha256 = hashlib.sha256(_DATA).hexdigest()
    tables.datasets[1] = Dataset(
        dataset_id=1,
        name="rows",
        sha256=sha256,
        size_bytes=len(_DATA),
        num_examples=1,
        format="text",
        file_format="jsonl",
        compression="",
        file_sha256=sha256,
        file_size_bytes=len(_DATA),
        statistics=None,
        create_time=now,
    )
    tables.projects[1] = Project(project_id=1, draft=draft("project", 1), create_time=now, update_time=now, etag="1")
    return tables


def simulate(seed: int, *, traced: bool = False, database: Path | None = None) -> Outcome:
    """Carries out the schedule of a seed. With `database`, every transaction is also done in a real one there, whose
    records must be the same; then nothing is restored from a backup."""
    # What the core says would drown the trace and cost most of the time.
    logging_before = structlog.get_config() if structlog.is_configured() else None
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    loop = VirtualLoop()
    loop.set_exception_handler(lambda _loop, _context: None)
    world = World(seed, loop, traced=traced)
    shadow = None if database is None else SqlShadow(database, world.disk.tables)
    world.disk.shadow = shadow
    broken = ""
    try:
        loop.run_until_complete(world.run())
    except (Broken, NothingWillHappen) as error:
        broken = str(error)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.close()
        if shadow is not None:
            shadow.close()
        structlog.reset_defaults()
        if logging_before is not None:
            structlog.configure(**logging_before)
    tables = world.disk.tables
    return Outcome(
        seed=seed,
        broken=broken,
        num_commits=world.watch.num_commits,
        num_crashes=world.lives.num_ended,
        num_restores=world.faults.num_restores,
        num_attempts=sum(job.attempt for job in tables.jobs.values()),
        virtual_seconds=loop.time(),
        digest=world.digest(),
        trace=world.trace.lines,
    )
