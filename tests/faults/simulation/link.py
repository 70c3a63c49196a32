"""The network between control and a node, by the dice: late, lost and repeated calls, streams that drop, stall and
repeat. Implements control's `NodeClient` over a `SimNode`."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from control_service.app.ports import StartRun
from control_service.domain.errors import NotFound, TunesmithError, Unavailable
from control_service.domain.event import StoredEvent
from control_service.domain.node import NodeCapabilities, NodeReport
from control_service.domain.run import ObservedRun, RunKey, StopMode
from tests.faults.simulation.node import SimNode
from tests.faults.simulation.run import SimRun

T = TypeVar("T")
# A link on which nothing comes is given up after this; it is the keepalive of the real one.
_KEEPALIVE_SECONDS = 20.0


@dataclass
class Weather:
    """How bad the network to one node is just now; chances are of one call or batch."""

    dice: random.Random
    is_cut: bool = False
    # Open connections, and nothing passes.
    is_black_hole: bool = False
    # What streams bring is held back, and comes at the worst moment.
    is_held: bool = False
    request_lost: float = 0.0
    answer_lost: float = 0.0
    start_repeated: float = 0.0
    stream_dropped: float = 0.0
    batch_repeated: float = 0.0
    trace: Callable[[str], None] = field(default=lambda _: None)
    # When something of it last came late, or not at all.
    disturbed_at: float = 0.0
    # The node's report has just reached control.
    heard: Callable[[], None] = field(default=lambda: None)

    def __post_init__(self) -> None:
        self._let_go = asyncio.Event()

    def let_go(self) -> None:
        """What was held back comes now, all at once."""
        self._let_go.set()
        self._let_go = asyncio.Event()

    def disturb(self) -> None:
        """What is sent now comes late, or not at all."""
        self.disturbed_at = asyncio.get_running_loop().time()

    async def pass_stream(self) -> None:
        """Waits while streams are held back."""
        if self.is_held:
            self.disturb()
            await self._let_go.wait()

    def calm(self) -> None:
        """Nothing is lost any more."""
        self.is_held = False
        self.let_go()
        self.is_cut = self.is_black_hole = False
        self.request_lost = self.answer_lost = self.start_repeated = 0.0
        self.stream_dropped = self.batch_repeated = 0.0


class SimClient:
    """One life of control's connection to a node; `life` raises once that control is dead."""

    def __init__(self, node: SimNode, weather: Weather, *, installation_id: str, life: Callable[[], None]) -> None:
        self._node = node
        self._weather = weather
        self._installation_id = installation_id
        self._life = life

    async def _call(self, what: str, work: Callable[[SimNode], T], *, repeated: float = 0.0) -> T:
        self._life()
        weather, dice = self._weather, self._weather.dice
        await asyncio.sleep(dice.uniform(0.001, 0.05))
        if weather.is_black_hole:
            weather.disturb()
            await asyncio.sleep(_KEEPALIVE_SECONDS)
        self._refuse_if_away()
        if dice.random() < weather.request_lost:
            raise self._lost(what)
        try:
            answer = work(self._node)
        except TunesmithError as error:
            weather.trace(f"{self._node.name}: {what} refused {error.reason}")
            raise
        if dice.random() < repeated:
            # The same request once more, from a connection that was given up, when nobody expects it.
            asyncio.get_running_loop().call_later(dice.uniform(0.01, 60.0), self._again, what, work)
        await asyncio.sleep(dice.uniform(0.001, 0.05))
        self._refuse_if_away()
        if dice.random() < weather.answer_lost:
            raise self._lost(f"answer of {what}")
        return answer

    def _again(self, what: str, work: Callable[[SimNode], Any]) -> None:
        if not self._node.is_serving:
            return
        try:
            work(self._node)
        except TunesmithError as error:
            self._weather.trace(f"{self._node.name}: late {what} refused {error.reason}")
        else:
            self._weather.trace(f"{self._node.name}: late {what} was heard")

    def _refuse_if_away(self) -> None:
        if not self._node.is_serving or self._weather.is_cut or self._weather.is_black_hole:
            self._weather.disturb()
            raise Unavailable("NODE_UNREACHABLE", f"node {self._node.name} does not answer")

    def _lost(self, what: str) -> Unavailable:
        self._weather.disturb()
        self._weather.trace(f"{self._node.name}: {what} is lost")
        return Unavailable("NODE_UNREACHABLE", "the connection was lost")

    # The calls of the port.

    async def capabilities(self) -> NodeCapabilities:
        return await self._call("capabilities", SimNode.capabilities)

    async def plan_run(self, **_: Any) -> Mapping[str, Any]:
        return await self._call("plan_run", lambda node: {"level": "PLAN_LEVEL_CHECK"})

    async def start_run(self, request: StartRun) -> ObservedRun:
        what = f"start_run {request.key.job_id}/{request.key.attempt}"
        return await self._call(what, lambda node: node.start(request), repeated=self._weather.start_repeated)

    async def get_run(self, key: RunKey) -> ObservedRun | None:
        run = await self._call("get_run", lambda node: self._find(key))
        return None if run is None else run.observed()

    async def stop_run(self, key: RunKey, *, mode: StopMode, grace_seconds: float = 0.0) -> ObservedRun | None:
        def stop(node: SimNode) -> ObservedRun | None:
            return None if self._find(key) is None else node.stop(key.job_id, key.attempt, mode)

        return await self._call(f"stop_run {key.job_id}/{key.attempt} {mode}", stop)

    async def release_run(self, key: RunKey) -> int:
        def release(node: SimNode) -> int:
            return 0 if self._find(key) is None else node.release(key.job_id, key.attempt)

        return await self._call(f"release_run {key.job_id}/{key.attempt}", release)

    async def watch_run(self, key: RunKey, *, after_run_sequence: int) -> AsyncIterator[Sequence[StoredEvent]]:
        position = after_run_sequence
        while True:
            run = await self._call("watch_run", lambda node: self._find(key))
            if run is None:
                raise NotFound("RUN_NOT_FOUND", "no such run")
            batch = run.journal[position:]
            if batch:
                first = position
                if self._weather.dice.random() < self._weather.batch_repeated:
                    first = max(0, position - 2)
                sent = run.journal[first:]
                position = first + len(sent)
                await self._weather.pass_stream()
                self._life()
                yield sent
                if self._weather.dice.random() < self._weather.stream_dropped:
                    raise self._lost("stream of a run")
            elif run.is_over:
                return
            else:
                await self._quiet(_KEEPALIVE_SECONDS)

    async def watch_node(self, *, heartbeat_seconds: float) -> AsyncIterator[NodeReport]:
        while True:
            report = await self._call("watch_node", SimNode.report)
            await self._weather.pass_stream()
            self._life()
            self._weather.heard()
            yield report
            if self._weather.dice.random() < self._weather.stream_dropped:
                raise self._lost("stream of reports")
            await self._quiet(heartbeat_seconds)

    async def find_missing_blobs(self, sha256s: Sequence[str]) -> Mapping[str, int]:
        return await self._call(
            "find_missing_blobs", lambda node: {sha256: 0 for sha256 in sha256s if sha256 not in node.blobs}
        )

    async def write_blob(self, *, sha256: str, size_bytes: int, offset: int, chunks: AsyncIterable[bytes]) -> None:
        data = b"".join([chunk async for chunk in chunks])
        await self._call("write_blob", lambda node: node.blobs.__setitem__(sha256, data))

    async def read_blob(self, sha256: str, *, offset: int = 0) -> AsyncIterator[bytes]:
        yield (await self._call("read_blob", lambda node: node.read(sha256)))[offset:]

    async def close(self) -> None:
        return None

    async def _quiet(self, seconds: float) -> None:
        try:
            # The node's own clock times it.
            await asyncio.wait_for(self._node.wait_changed(), seconds / self._node.rate)
        except TimeoutError:
            return

    def _find(self, key: RunKey) -> SimRun | None:
        run = self._node.runs.get((key.job_id, key.attempt))
        return run if run is not None and run.request.key.installation_id == key.installation_id else None
