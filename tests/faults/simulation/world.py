"""One schedule: users, nodes, network, clocks, disk and crashes, drawn from a seed; then calm, until all is over."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from control_service.app import jobs, nodes, training
from control_service.app.idempotency import RequestKey
from control_service.app.ports import StartRun
from control_service.domain.dataset import Dataset
from control_service.domain.errors import ResourceExhausted, TunesmithError, Unavailable
from control_service.domain.failure import Failure, Fault
from control_service.domain.job_state import JobState
from control_service.domain.project import Project
from control_service.domain.run import RunState
from tests.fakes.control_blobs import MemoryBlobStore
from tests.fakes.control_codec import PickleCodec
from tests.fakes.control_core import draft
from tests.faults.simulation.invariants import Broken, Watch, check_end, hold
from tests.faults.simulation.life import Disk, Life, WallClock
from tests.faults.simulation.link import Weather
from tests.faults.simulation.memory_store import Tables
from tests.faults.simulation.node import Script, SimNode, SimRun
from tests.faults.simulation.sql_shadow import SqlShadow
from tests.faults.simulation.virtual_loop import NothingWillHappen, VirtualLoop

_DATA = b'{"text": "row"}\n'
# Trouble ends here; then everything works, and this much later every job must be over.
_TROUBLE_SECONDS = 150.0
_CALM_SECONDS = 3600.0
# How fast the clocks of a machine may run, to true time. A lease bears any two of them; `docs/operations.md` says so.
_RATES = (0.5, 0.8, 1.0, 1.0, 1.25, 2.0)

_FAILURES: tuple[tuple[str, Fault], ...] = (
    ("ENGINE_KILLED", Fault.PLATFORM),
    ("ENGINE_EXITED", Fault.PLATFORM),
    ("HANG", Fault.PLATFORM),
    ("HOST_OUT_OF_MEMORY", Fault.PLATFORM),
    ("CHECKPOINT_WRITE", Fault.PLATFORM),
    ("TRAINING", Fault.PLATFORM),
    ("DEVICE_OUT_OF_MEMORY", Fault.HARDWARE),
    ("NON_FINITE_LOSS", Fault.USER),
    ("DOES_NOT_FIT", Fault.USER),
    ("RESUME_MISMATCH", Fault.HARDWARE),
)


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
        self._dice = random.Random(seed)
        self._lines: list[str] | None = [] if traced else None
        self._codec = PickleCodec()
        clock = WallClock(loop, rate=self._dice.choice(_RATES))
        self.disk = Disk(
            tables=_tables(clock),
            blobs=MemoryBlobStore(),
            clock=clock,
            dice=self._dice,
            on_commit=self._committed,
            on_broken=self._note_broken,
            trace=self.trace,
        )
        self.disk.blobs.add(_DATA)
        dice = self._dice
        self.nodes = [
            SimNode(
                name,
                num_devices=dice.choice((1, 1, 2)),
                dice=dice,
                script_of=self._script,
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
        self.watch = Watch(
            num_devices={node.name: node.num_devices for node in self.nodes},
            now_seconds=loop.time,
            num_lives=lambda: self.num_crashes,
            on_dispatch=self._let_go,
            too_small_for={node.name: node.too_small_for for node in self.nodes},
            silence_seconds=lambda name: clock.rate * (self._awake_seconds() - self._heard_at.get(name, 0.0)),
            was_disturbed=lambda name: self._weather[name].disturbed_at >= self._told_at.get(name, 0.0),
            clock_rate=clock.rate,
        )
        self._backup: tuple[Tables, dict[str, bytes], dict[str, Any]] | None = None
        self._restores = False
        self._poison: set[str] = set()
        self._broken: Broken | None = None
        self._is_calm = False
        self.num_crashes = 0
        self.num_restores = 0
        self._acknowledged: set[str] = set()
        self._requests: set[str] = set()
        self._traced: dict[str, int] = {}
        self._own: set[asyncio.Task[Any]] = set()
        self._life: Life | None = None

    def _awake_seconds(self) -> float:
        return self._loop.time() - self._loop.stopped_seconds

    def _let_go(self) -> None:
        for weather in self._weather.values():
            weather.let_go()

    def _heard(self, name: str) -> None:
        self._heard_at[name] = self._awake_seconds()
        self._told_at[name] = self._loop.time()

    @property
    def lines(self) -> list[str]:
        """The trace."""
        return self._lines or []

    def trace(self, line: str) -> None:
        if self._lines is not None:
            self._lines.append(f"{self._loop.time():9.3f}  {line}")

    # The schedule.

    async def run(self) -> None:
        """Raises Broken."""
        main = asyncio.current_task()
        assert main is not None
        self._own.add(main)
        self._spawn(self._keep_control())
        actors = [self._spawn(work) for work in (self._use(), self._hurt(), self._hurt())]
        await asyncio.wait(actors)
        for actor in actors:
            actor.result()
        self._calm()
        ends_at = self._loop.time() + _CALM_SECONDS
        while not self._is_settled():
            self._raise_if_broken()
            hold(self._loop.time() < ends_at, f"after an hour of calm: {self._waiting()}")
            await self._resume_all()
            await asyncio.sleep(5.0)
        self._raise_if_broken()
        missing = self._acknowledged - self.disk.tables.jobs.keys()
        hold(not missing, f"acknowledged and gone: {sorted(missing)}")
        hold(len(self.disk.tables.jobs) <= len(self._requests), "a request made two jobs")
        check_end(self.disk.tables, self.nodes, self.disk.blobs.outputs)

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

    def _calm(self) -> None:
        self.trace("--- calm")
        self._is_calm = True
        self.disk.refuses = False
        self.disk.dies_after_commits = 0
        for node in self.nodes:
            node.start_error = None
            self._weather[node.name].calm()
            if not node.is_serving:
                node.come_back()

    # Control, again and again.

    async def _keep_control(self) -> None:
        while True:
            life = self._life = Life(self.disk, self.nodes, self._weather, self._codec)
            starting = asyncio.create_task(
                life.runtime.start(configured_nodes=[(node.name, node.name) for node in self.nodes])
            )
            died = self._spawn(life.died.wait())
            await asyncio.wait({starting, died}, return_when=asyncio.FIRST_COMPLETED)
            if not life.died.is_set() and isinstance(starting.exception(), TunesmithError):
                self.trace(f"control does not start: {starting.exception()}")
                life.die()
            await died
            self.num_crashes += 1
            self.trace("control is dead")
            await self._clear(starting)
            await asyncio.sleep(self._dice.choice((0.1, 1.0, 5.0, 40.0)))
            if self._restores:
                self._restore()
            self.trace("control starts")

    async def _clear(self, starting: asyncio.Task[Any]) -> None:
        engines = {run.task for node in self.nodes for run in node.history}
        left = asyncio.all_tasks() - self._own - engines - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.wait({starting, *left})

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._own.add(task)
        task.add_done_callback(self._own.discard)
        return task

    def _committed(self) -> None:
        try:
            self.watch.committed(self.disk.tables, steady_now=self._steady_now())
        except Broken as broken:
            self._note_broken(broken)
        if self._lines is not None:
            self._trace_commit()

    def _note_broken(self, broken: Broken) -> None:
        self._broken = self._broken or broken

    def _steady_now(self) -> Any:
        return self.disk.clock.steady_utc_now()

    def _trace_commit(self) -> None:
        for job_id, events in self.disk.tables.events.items():
            known = self._traced.get(job_id, 0)
            for event in events[known:]:
                fact = self._codec.decode(event.kind, event.payload)
                self.trace(f"  log {job_id} {event.sequence} attempt {event.attempt}: {fact}"[:200])
            self._traced[job_id] = len(events)

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    # Users.

    async def _use(self) -> None:
        dice = self._dice
        for number in range(dice.randint(2, 6)):
            await asyncio.sleep(dice.expovariate(1 / 8.0))
            await self._start(number)
            for _ in range(dice.choice((0, 0, 1, 2))):
                await asyncio.sleep(dice.expovariate(1 / 5.0))
                await self._ask_for_something()
        while self._loop.time() < _TROUBLE_SECONDS:
            await asyncio.sleep(dice.expovariate(1 / 25.0))
            await self._ask_for_something()

    async def _start(self, number: int) -> None:
        dice = self._dice
        priority, max_retries = dice.choice((0, 0, 0, 1)), dice.choice((0, 1, 2, 2))
        request = RequestKey(method="StartTraining", request_id=f"r{number}", body_digest=f"{priority}{max_retries}")
        is_poison = dice.random() < 0.1
        self._requests.add(request.request_id)

        async def start(life: Life) -> str:
            view = await training.start_training(
                1,
                priority=priority,
                max_retries=max_retries,
                timeout_seconds=5.0,
                store=life.store,
                nodes=life.runtime.nodes,
                clock=life.clock,
                ids=life.ids,
                codec=life.codec,
                request=request,
            )
            return view.job.job_id

        # A client of ours: the same request until it is answered.
        while (job_id := await self._ask(start)) is None:  # noqa: ASYNC110 - nothing tells a client
            await asyncio.sleep(0.5)
        self.trace(f"user: started {job_id}")
        self._acknowledged.add(job_id)
        if is_poison:
            self._poison.add(job_id)

    async def _ask_for_something(self) -> None:
        dice = self._dice
        if not self._acknowledged:
            return
        job_id = dice.choice(sorted(self._acknowledged))
        verb = dice.choice(("cancel", "pause", "pause", "resume", "resume", "drain", "undrain"))
        if verb in ("drain", "undrain"):
            await self._drain(undo=verb == "undrain")
            return
        use_case: Callable[..., Any] = {
            "cancel": jobs.cancel_job,
            "pause": jobs.pause_job,
            "resume": jobs.resume_job,
        }[verb]

        async def change(life: Life) -> Any:
            return await use_case(
                job_id, store=life.store, nodes=life.runtime.nodes, clock=life.clock, codec=life.codec
            )

        view = await self._ask(change)
        self.trace(f"user: {verb} {job_id}: {view.job.state if view else 'no answer'}")

    async def _drain(self, *, undo: bool, interrupt: bool | None = None) -> None:
        name = self._dice.choice(self.nodes).name
        interrupts = self._dice.random() < 0.5 if interrupt is None else interrupt

        async def drain(life: Life) -> Any:
            return await nodes.drain_node(
                name,
                undo=undo,
                interrupt=interrupts,
                store=life.store,
                nodes=life.runtime.nodes,
                clock=life.clock,
            )

        await self._ask(drain)
        self.trace(f"user: drain {name} undo={undo} interrupt={interrupts}")

    async def _resume_all(self) -> None:
        for node in self.nodes:
            record = self.disk.tables.nodes.get(node.name)
            if record is not None and record.draining:

                async def undrain(life: Life, name: str = node.name) -> Any:
                    return await nodes.drain_node(
                        name,
                        undo=True,
                        store=life.store,
                        nodes=life.runtime.nodes,
                        clock=life.clock,
                    )

                await self._ask(undrain)
        for job in list(self.disk.tables.jobs.values()):
            if job.state is JobState.PAUSED:

                async def resume(life: Life, job_id: str = job.job_id) -> Any:
                    return await jobs.resume_job(
                        job_id,
                        store=life.store,
                        nodes=life.runtime.nodes,
                        clock=life.clock,
                        codec=life.codec,
                    )

                await self._ask(resume)

    async def _ask(self, call: Callable[[Life], Coroutine[Any, Any, Any]]) -> Any:
        """The answer; None when control refused, or died of it or before."""
        life = self._life
        if life is None or not life.alive:
            return None
        asked = asyncio.create_task(call(life))
        died = self._spawn(life.died.wait())
        await asyncio.wait({asked, died}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if not asked.done():
            return None
        try:
            return asked.result()
        except (TunesmithError, asyncio.CancelledError):
            return None

    # Faults.

    async def _hurt(self) -> None:
        dice = self._dice
        faults = (
            self._cut,
            self._black_hole,
            self._bad_weather,
            self._hold_back,
            self._hold_back,
            self._server_restarts,
            self._power_loss,
            self._power_loss,
            self._engine_dies,
            self._engine_dies,
            self._crash,
            self._crash,
            self._crash,
            self._back_up,
            self._lose_control,
            self._disk_refuses,
            self._wall_clock_jumps,
            self._stall,
            self._node_refuses,
        )
        while self._loop.time() < _TROUBLE_SECONDS:
            await asyncio.sleep(dice.expovariate(1 / 20.0))
            fault = dice.choice(faults)
            self.trace(f"fault: {fault.__name__[1:]}")
            await fault(dice.choice(self.nodes))

    async def _cut(self, node: SimNode) -> None:
        self._weather[node.name].is_cut = True
        node.changed()
        await asyncio.sleep(self._dice.choice((1.0, 10.0, 29.0, 31.0, 80.0)))
        self._weather[node.name].is_cut = False

    async def _black_hole(self, node: SimNode) -> None:
        self._weather[node.name].is_black_hole = True
        await asyncio.sleep(self._dice.choice((5.0, 25.0, 60.0)))
        self._weather[node.name].is_black_hole = False

    async def _hold_back(self, node: SimNode) -> None:
        weather = self._weather[node.name]
        weather.is_held = True
        await asyncio.sleep(self._dice.choice((5.0, 40.0, 80.0)))
        weather.is_held = False
        weather.let_go()

    async def _bad_weather(self, node: SimNode) -> None:
        weather = self._weather[node.name]
        weather.request_lost = weather.answer_lost = weather.stream_dropped = 0.2
        weather.start_repeated, weather.batch_repeated = 0.5, 0.3
        await asyncio.sleep(self._dice.uniform(5.0, 60.0))
        if not self._is_calm:
            weather.request_lost = weather.answer_lost = weather.stream_dropped = 0.0
            weather.start_repeated = weather.batch_repeated = 0.0

    async def _server_restarts(self, node: SimNode) -> None:
        if node.is_serving:
            node.restart_server(is_serving=False)
            await asyncio.sleep(self._dice.choice((0.5, 5.0, 45.0)))
            node.restart_server(is_serving=True)

    async def _power_loss(self, node: SimNode) -> None:
        if node.is_serving:
            node.lose_power()
            await asyncio.sleep(self._dice.choice((3.0, 20.0, 50.0, 90.0)))
            wiped = self._dice.random() < 0.3
            self.trace(f"{node.name} comes back, wiped={wiped}")
            node.come_back(wiped=wiped)

    async def _engine_dies(self, node: SimNode) -> None:
        node.kill_engine()

    async def _crash(self, node: SimNode) -> None:
        self.disk.dies_before = self._dice.random() < 0.5
        self.disk.dies_after_commits = self._dice.randint(1, 6)

    async def _back_up(self, node: SimNode) -> None:
        blobs = self.disk.blobs
        self._backup = (self.disk.tables.copy(), dict(blobs.blobs), dict(blobs.outputs))

    async def _lose_control(self, node: SimNode) -> None:
        """Control's machine is lost, and begins again from the backup, if there is one."""
        self._restores = self._backup is not None and self.disk.shadow is None
        await self._crash(node)

    def _restore(self) -> None:
        self._restores = False
        assert self._backup is not None
        tables, blobs, outputs = self._backup
        self.disk.tables = tables.copy()
        self.disk.blobs.blobs, self.disk.blobs.outputs = dict(blobs), dict(outputs)
        self.trace(f"restored: {[f'{job.job_id} {job.state} {job.attempt}' for job in tables.jobs.values()]}")
        self.watch.begin_anew(self.disk.tables)
        # What was asked for since is lost, and so are the answers to it.
        self._acknowledged &= self.disk.tables.jobs.keys()
        self._traced = {job_id: len(log) for job_id, log in tables.events.items()}
        self.num_restores += 1

    async def _disk_refuses(self, node: SimNode) -> None:
        self.disk.refuses = True
        await asyncio.sleep(self._dice.choice((0.5, 5.0, 35.0)))
        self.disk.refuses = False

    async def _wall_clock_jumps(self, node: SimNode) -> None:
        self.disk.clock.jump(self._dice.choice((-3600.0, 3600.0, -30.0, 30.0)))

    async def _stall(self, node: SimNode) -> None:
        # Control is stopped, its node is not; what the node said meanwhile lies in the socket.
        self._loop.stall(self._dice.choice((5.0, 31.0, 90.0)))

    async def _node_refuses(self, node: SimNode) -> None:
        node.start_error = self._dice.choice(
            (
                ResourceExhausted("NODE_BUSY", "not now"),
                Unavailable("NODE_UNREACHABLE", "not now"),
                ResourceExhausted("DOES_NOT_FIT", "too small"),
            )
        )
        await asyncio.sleep(self._dice.uniform(1.0, 20.0))
        node.start_error = None

    def _script(self, request: StartRun) -> Script:
        dice = self._dice
        num_steps, step_seconds = dice.randint(3, 10), dice.choice((0.1, 1.0, 3.0))
        if dice.random() < 0.2:
            # So long that nothing but heartbeats is heard in between.
            num_steps, step_seconds = 3, 40.0
        begins = request.resume_from.step if request.resume_from else 0
        script = Script(
            num_steps=max(num_steps, begins + 1),
            step_seconds=step_seconds,
            save_every=dice.choice((0, 2, 3)),
            stop_seconds=dice.choice((0.0, 0.0, 5.0)),
        )
        if request.key.job_id in self._poison:
            poison = Failure(reason="ENGINE_KILLED", fault=Fault.PLATFORM, message="poison", signal=11)
            return replace(script, fail_at_step=begins + 1, failure=poison)
        if self._is_calm or dice.random() < 0.8:
            return script
        reason, fault = dice.choice(_FAILURES)
        details = {}
        if reason == "RESUME_MISMATCH" and request.resume_from is not None:
            details = {"checkpoint": request.resume_from.checkpoint}
        failure = Failure(reason=reason, fault=fault, message="scripted", details=details)
        return replace(script, fail_at_step=dice.randint(1, num_steps), failure=failure)

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
        num_crashes=world.num_crashes,
        num_restores=world.num_restores,
        num_attempts=sum(job.attempt for job in tables.jobs.values()),
        virtual_seconds=loop.time(),
        digest=world.digest(),
        trace=world.lines,
    )
