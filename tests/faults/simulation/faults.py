"""What goes wrong with network, nodes, disk, clocks and control itself, drawn from the dice; `calm` ends all of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from control_service.domain.errors import ResourceExhausted, Unavailable
from tests.faults.simulation.life import Disk
from tests.faults.simulation.link import Weather
from tests.faults.simulation.memory_store import Tables
from tests.faults.simulation.node import SimNode
from tests.faults.simulation.virtual_loop import VirtualLoop


class Faults:
    """`on_restore` is told when control's tables are those of the backup."""

    def __init__(
        self,
        *,
        disk: Disk,
        nodes: list[SimNode],
        weather: dict[str, Weather],
        loop: VirtualLoop,
        trouble_seconds: float,
        on_restore: Callable[[], None],
    ) -> None:
        self._disk = disk
        self._nodes = nodes
        self._weather = weather
        self._loop = loop
        self._trouble_seconds = trouble_seconds
        self._on_restore = on_restore
        self._dice = disk.dice
        self._backup: tuple[Tables, dict[str, bytes], dict[str, Any]] | None = None
        self._restores = False
        self._is_calm = False
        self.num_restores = 0

    async def hurt(self) -> None:
        """One fault after the other, until the trouble ends."""
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
        while self._loop.time() < self._trouble_seconds:
            await asyncio.sleep(dice.expovariate(1 / 20.0))
            fault = dice.choice(faults)
            self._disk.trace(f"fault: {fault.__name__[1:]}")
            await fault(dice.choice(self._nodes))

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
            self._disk.trace(f"{node.name} comes back, wiped={wiped}")
            node.come_back(wiped=wiped)

    async def _engine_dies(self, node: SimNode) -> None:
        node.kill_engine()

    async def _crash(self, node: SimNode) -> None:
        self._disk.dies_before = self._dice.random() < 0.5
        self._disk.dies_after_commits = self._dice.randint(1, 6)

    async def _back_up(self, node: SimNode) -> None:
        blobs = self._disk.blobs
        self._backup = (self._disk.tables.copy(), dict(blobs.blobs), dict(blobs.outputs))

    async def _lose_control(self, node: SimNode) -> None:
        """Control's machine is lost, and begins again from the backup, if there is one."""
        self._restores = self._backup is not None and self._disk.shadow is None
        await self._crash(node)

    def restore(self) -> None:
        """Before control begins again: what it begins with, if its machine was lost."""
        if not self._restores:
            return
        self._restores = False
        assert self._backup is not None
        tables, blobs, outputs = self._backup
        self._disk.tables = tables.copy()
        self._disk.blobs.blobs, self._disk.blobs.outputs = dict(blobs), dict(outputs)
        self._disk.trace(f"restored: {[f'{job.job_id} {job.state} {job.attempt}' for job in tables.jobs.values()]}")
        self._on_restore()
        self.num_restores += 1

    async def _disk_refuses(self, node: SimNode) -> None:
        self._disk.refuses = True
        await asyncio.sleep(self._dice.choice((0.5, 5.0, 35.0)))
        self._disk.refuses = False

    async def _wall_clock_jumps(self, node: SimNode) -> None:
        self._disk.clock.jump(self._dice.choice((-3600.0, 3600.0, -30.0, 30.0)))

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

    def calm(self) -> None:
        """From now on everything works."""
        self._is_calm = True
        self._disk.refuses = False
        self._disk.dies_after_commits = 0
        for node in self._nodes:
            node.start_error = None
            self._weather[node.name].calm()
            if not node.is_serving:
                node.come_back()
