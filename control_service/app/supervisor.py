"""Has a keeper for every job that is on a node, and wakes keepers when their job or node changes. Decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import structlog

from control_service.app.keeper import JobKeeper, KeeperPorts
from control_service.app.store_ports import CommitNotice
from control_service.app.tasks import TaskSet
from control_service.domain.job_state import ON_NODE


class Supervisor:
    """Started once; takes up every live job, whoever left it."""

    def __init__(self, ports: KeeperPorts) -> None:
        self._ports = ports
        self._keepers: dict[str, JobKeeper] = {}
        self._tasks = TaskSet()
        self._jobs_changed = asyncio.Event()
        ports.store.subscribe(self._on_commit)
        ports.nodes.subscribe(self._on_node)

    def start(self) -> None:
        """Looks for jobs to keep, now and after every commit that moved one."""
        self._keep_up("supervisor", self._run)

    async def stop(self) -> None:
        """Ends every keeper. Runs go on."""
        await self._tasks.stop_all()

    async def _run(self) -> None:
        # Also when it begins again after an error: what woke it then was not seen to.
        self._jobs_changed.set()
        while True:
            await self._jobs_changed.wait()
            self._jobs_changed.clear()
            live = await self._ports.store.read(lambda tx: tx.jobs.in_states(ON_NODE))
            for job in live:
                if job.job_id not in self._tasks:
                    keeper = self._keepers[job.job_id] = JobKeeper(job.job_id, self._ports)
                    self._keep_up(job.job_id, partial(self._keep, keeper, job.job_id))

    async def _keep(self, keeper: JobKeeper, job_id: str) -> None:
        # On every line of log of this task and of those that it starts.
        structlog.contextvars.bind_contextvars(job_id=job_id)
        await keeper.run()
        self._keepers.pop(job_id, None)
        # The job may be on a node again already. One whose keeper failed waits for the next commit that moves a job.
        asyncio.get_running_loop().call_soon(self._jobs_changed.set)

    def _keep_up(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks.keep(name, work, clock=self._ports.clock, back_off=self._ports.back_off)

    def _on_commit(self, notice: CommitNotice) -> None:
        if notice.jobs_changed:
            self._jobs_changed.set()
            for job_id in notice.job_sequences:
                if (keeper := self._keepers.get(job_id)) is not None:
                    keeper.wake()

    def _on_node(self, name: str) -> None:
        for keeper in self._keepers.values():
            if keeper.node == name:
                keeper.wake()
