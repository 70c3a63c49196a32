"""The process: settings, logs, the lock, one event loop, signals, exit codes. Knows nothing of what it runs."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

import structlog
import uvloop

from control_service import backup_command
from control_service.bootstrap import build
from control_service.config import Settings, SettingsError, as_text, load_settings
from control_service.data_directory import Taken, announced, forget_earlier, locked
from control_service.domain.errors import TunesmithError
from control_service.logs import configure_logs

EXIT_BAD_SETTINGS: Final = 2
EXIT_TAKEN: Final = 3

# The event loop lets go of the interpreter at every turn; threads that read the store are not to keep it for 5 ms then.
_SWITCH_SECONDS: Final = 0.0005
# Objects made before a collection, and collections of a generation before one of the next. Calls leave few cycles.
_COLLECT_AFTER: Final = (5_000, 20, 50)

_log: Final = structlog.get_logger("control.main")


def run() -> NoReturn:
    """The command `tunesmith-control`."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Serves until SIGTERM or SIGINT, or makes or restores a backup; the exit code."""
    if argv and argv[0] in backup_command.COMMANDS:
        return backup_command.main(argv)
    try:
        settings, print_only = load_settings(argv)
    except SettingsError as error:
        sys.stderr.write(f"tunesmith-control: bad settings: {error}\n")
        return EXIT_BAD_SETTINGS
    if print_only:
        sys.stdout.write(json.dumps(as_text(settings), indent=2) + "\n")
        return 0
    configure_logs(service="control", level=settings.log_level)
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        with locked(settings.data_directory):
            forget_earlier(settings.ready_file)
            # A call costs less than on asyncio's own loop.
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(settings))
    except Taken as error:
        sys.stderr.write(f"tunesmith-control: {error}\n")
        return EXIT_TAKEN
    except TunesmithError as error:
        sys.stderr.write(f"tunesmith-control: cannot start: {error}\n")
        return 1
    return 0


async def _serve(settings: Settings) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    application = await build(settings)
    try:
        await application.start()
        # What is there now stays: not looked through again by every full collection, during which nobody is answered.
        gc.freeze()
        gc.set_threshold(*_COLLECT_AFTER)
        with announced(settings.ready_file, address=application.address):
            _log.info("serving", address=application.address, data_directory=str(settings.data_directory))
            await stopping.wait()
            _log.info("stopping", grace_seconds=settings.grace_seconds)
    finally:
        await application.stop()
    _log.info("stopped")
