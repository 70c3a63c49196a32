"""What users ask for: training, and to stop, pause or go on with it; nodes to drain. Each asks as a client of ours
would, and remembers what was acknowledged."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from control_service.app import jobs, nodes, training
from control_service.app.idempotency import RequestKey
from control_service.domain.job_state import JobState
from tests.faults.simulation.life import Disk, Life
from tests.faults.simulation.lives import Lives
from tests.faults.simulation.memory_store import Tables
from tests.faults.simulation.node import SimNode


class Users:
    """`use` is all that they do while there is trouble; `resume_all` what they do behind it."""

    def __init__(
        self, *, lives: Lives, disk: Disk, nodes: list[SimNode], poison: set[str], trouble_seconds: float
    ) -> None:
        self._lives = lives
        self._disk = disk
        self._nodes = nodes
        # Jobs that are to fail again and again.
        self._poison = poison
        self._trouble_seconds = trouble_seconds
        self._dice: random.Random = disk.dice
        self.acknowledged: set[str] = set()
        self.requests: set[str] = set()

    def begin_anew(self, tables: Tables) -> None:
        """After a restore: what was asked for since is lost, and so are the answers to it."""
        self.acknowledged &= tables.jobs.keys()

    async def use(self) -> None:
        """Until the trouble ends."""
        dice = self._dice
        for number in range(dice.randint(2, 6)):
            await asyncio.sleep(dice.expovariate(1 / 8.0))
            await self._start(number)
            for _ in range(dice.choice((0, 0, 1, 2))):
                await asyncio.sleep(dice.expovariate(1 / 5.0))
                await self._ask_for_something()
        while asyncio.get_running_loop().time() < self._trouble_seconds:
            await asyncio.sleep(dice.expovariate(1 / 25.0))
            await self._ask_for_something()

    async def _start(self, number: int) -> None:
        dice = self._dice
        priority, max_retries = dice.choice((0, 0, 0, 1)), dice.choice((0, 1, 2, 2))
        request = RequestKey(method="StartTraining", request_id=f"r{number}", body_digest=f"{priority}{max_retries}")
        is_poison = dice.random() < 0.1
        self.requests.add(request.request_id)

        async def start(life: Life) -> str:
            view = await training.start_training(
                1,
                priority=priority,
                max_retries=max_retries,
                timeout_seconds=5.0,
                store=life.store,
                nodes=life.runtime.nodes,
                queue=life.runtime.queue,
                clock=life.clock,
                ids=life.ids,
                codec=life.codec,
                request=request,
            )
            return view.job.job_id

        # A client of ours: the same request until it is answered.
        while (job_id := await self._lives.ask(start)) is None:  # noqa: ASYNC110 - nothing tells a client
            await asyncio.sleep(0.5)
        self._disk.trace(f"user: started {job_id}")
        self.acknowledged.add(job_id)
        if is_poison:
            self._poison.add(job_id)

    async def _ask_for_something(self) -> None:
        dice = self._dice
        if not self.acknowledged:
            return
        job_id = dice.choice(sorted(self.acknowledged))
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
                job_id, store=life.store, queue=life.runtime.queue, clock=life.clock, codec=life.codec
            )

        view = await self._lives.ask(change)
        self._disk.trace(f"user: {verb} {job_id}: {view.job.state if view else 'no answer'}")

    async def _drain(self, *, undo: bool) -> None:
        name = self._dice.choice(self._nodes).name
        interrupts = self._dice.random() < 0.5

        async def drain(life: Life) -> Any:
            return await nodes.drain_node(
                name,
                undo=undo,
                interrupt=interrupts,
                store=life.store,
                nodes=life.runtime.nodes,
                clock=life.clock,
            )

        await self._lives.ask(drain)
        self._disk.trace(f"user: drain {name} undo={undo} interrupt={interrupts}")

    async def resume_all(self) -> None:
        """Have every node and job go on."""
        for node in self._nodes:
            record = self._disk.tables.nodes.get(node.name)
            if record is not None and record.draining:

                async def undrain(life: Life, name: str = node.name) -> Any:
                    return await nodes.drain_node(
                        name,
                        undo=True,
                        store=life.store,
                        nodes=life.runtime.nodes,
                        clock=life.clock,
                    )

                await self._lives.ask(undrain)
        for job in list(self._disk.tables.jobs.values()):
            if job.state is JobState.PAUSED:

                async def resume(life: Life, job_id: str = job.job_id) -> Any:
                    return await jobs.resume_job(
                        job_id,
                        store=life.store,
                        queue=life.runtime.queue,
                        clock=life.clock,
                        codec=life.codec,
                    )

                await self._lives.ask(resume)
