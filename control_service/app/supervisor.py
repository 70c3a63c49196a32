"""Has a keeper for every job that is on a node, and wakes keepers when their job or node changes. Decides nothing."""

from __future__ import annotations

import asyncio
from functools import partial

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
        self._jobs_changed.set()
        self._tasks.start("supervisor", self._run)

    async def stop(self) -> None:
        """Ends every keeper. Runs go on."""
        await self._tasks.stop_all()

    async def _run(self) -> None:
        while True:
            await self._jobs_changed.wait()
            self._jobs_changed.clear()
            for job in await self._ports.store.read(lambda tx: tx.jobs.in_states(ON_NODE)):
                if job.job_id not in self._tasks:
                    keeper = self._keepers[job.job_id] = JobKeeper(job.job_id, self._ports)
                    self._tasks.start(job.job_id, partial(self._keep, keeper, job.job_id))

    async def _keep(self, keeper: JobKeeper, job_id: str) -> None:
        try:
            await keeper.run()
        finally:
            self._keepers.pop(job_id, None)
            # The job may be on a node again already.
            self._jobs_changed.set()

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
