"""Says by `grpc.health.v1` whether the service can work: SERVING while the store takes reads and writes and nothing
drains. `liveness` alone is SERVING for as long as anything answers."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any, Final

import structlog
from grpc_health.v1 import health, health_pb2

from control_service.app.ports import Clock
from control_service.app.store_ports import StoreWithRoom
from control_service.domain.errors import StoreFull

_log: Final = structlog.get_logger("control.health")
_CHECK_SECONDS: Final = 5.0
# A store that hangs does not work either.
_PATIENCE_SECONDS: Final = 5.0
# Whether the process should be restarted, which no other process' lock is a reason for.
LIVENESS: Final = "liveness"
# The service's own full name.
HEALTH: Final = "grpc.health.v1.Health"


class HealthReporter:
    """Reports for the whole server (the empty name) and for each service."""

    def __init__(self, *, store: StoreWithRoom, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._servicer = health.aio.HealthServicer()
        self._services: Collection[str] = ("",)
        self._task: asyncio.Task[None] | None = None

    @property
    def servicer(self) -> Any:
        """What serves the calls."""
        return self._servicer

    def report_for(self, services: Iterable[str]) -> None:
        """Also for these services, by their full names."""
        self._services = ("", *services)

    async def start(self) -> None:
        """Looks at the store once, then every few seconds."""
        await self._servicer.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self._look()
        self._task = asyncio.create_task(self._look_again(), name="health")

    async def drain(self) -> None:
        """NOT_SERVING from now on, but for `liveness`."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._tell(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _look_again(self) -> None:
        while True:
            await self._clock.sleep(_CHECK_SECONDS)
            await self._look()

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self._store.read(lambda tx: tx.nodes.list_all())
                # Changes nothing; only the lock is taken.
                await self._store.transact(lambda tx: None)
                await self._store.check_room()
            serving = True
        except StoreFull as error:
            _log.warning("the store has no room", reason=error.reason, message=error.message)
            serving = False
        except Exception:  # noqa: BLE001  # the outermost boundary of this task: whatever it is, the store does not work
            _log.exception("the store does not answer")
            serving = False
        await self._tell(
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )

    async def _tell(self, status: Any) -> None:
        for service in self._services:
            await self._servicer.set(service, status)
