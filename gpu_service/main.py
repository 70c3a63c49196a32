"""The process: settings, logs, the lock, one event loop, signals, the ready file, exit codes. Never imports torch."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NoReturn

import structlog

from gpu_service import logs
from gpu_service.bootstrap import Application, PortTaken, build
from gpu_service.config import Settings, SettingsInvalid, load
from gpu_service.shim import durable_json
from gpu_service.shim.lock import AlreadyHeld, hold

EXIT_BAD_SETTINGS: Final = 2
EXIT_TAKEN: Final = 3

_log = structlog.get_logger(__name__)


def run() -> NoReturn:
    """The command `tunesmith-gpu`."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str], *, make_application: Callable[[Settings], Awaitable[Application]] = build) -> int:
    """Serve until SIGTERM or SIGINT; gives the exit code."""
    try:
        settings = load(arguments)
    except SettingsInvalid as error:
        sys.stderr.write(f"tunesmith-gpu: bad settings: {error}\n")
        return EXIT_BAD_SETTINGS
    logs.configure("gpu")
    try:
        durable_json.make_directory(settings.data_directory)
        with hold(settings.data_directory / "lock"):
            asyncio.run(_serve(settings, make_application))
    except AlreadyHeld:
        sys.stderr.write(f"tunesmith-gpu: another process uses {settings.data_directory}\n")
        return EXIT_TAKEN
    except PortTaken as error:
        sys.stderr.write(f"tunesmith-gpu: {error}\n")
        return EXIT_TAKEN
    return 0


async def _serve(settings: Settings, make_application: Callable[[Settings], Awaitable[Application]]) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    application = await make_application(settings)
    try:
        await application.start()
        with _announced(settings, application.address):
            _log.info("serving", address=application.address, data_directory=str(settings.data_directory))
            await stopping.wait()
            _log.info("stopping", keep_engines=settings.keep_engines)
    finally:
        await application.stop()
    _log.info("stopped")


@contextmanager
def _announced(settings: Settings, address: str) -> Iterator[None]:
    """Write the ready file, whole or not at all, and take it away again."""
    if settings.ready_file is None:
        yield
        return
    settings.ready_file.parent.mkdir(parents=True, exist_ok=True)
    durable_json.write(settings.ready_file, {"address": address, "pid": os.getpid()})
    try:
        yield
    finally:
        settings.ready_file.unlink(missing_ok=True)


if __name__ == "__main__":
    run()
