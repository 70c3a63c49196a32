"""One JSON line for each log event, on standard error, from structlog and from libraries alike. Keeps no file."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import MutableMapping
from contextlib import suppress
from functools import partial
from typing import Any, Final, TextIO

import structlog

# A name or a message from outside must not fill the disk.
MAX_TEXT_CHARACTERS: Final = 8192


def configure_logs(*, service: str, level: str) -> None:
    """Sets up the process; call it once, before the first event."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _of_service(service),
        _cut_text,
    ]
    render = structlog.processors.JSONRenderer(serializer=_one_line)
    # Straight to the stream: by way of the standard library a line takes twice as long, and every call has one.
    structlog.configure(
        processors=[_add_name, *shared, render],
        logger_factory=partial(_Lines, sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                render,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Migrations announce themselves at every start; only what goes wrong there is of interest.
    logging.getLogger("alembic").setLevel(logging.WARNING)


class _Lines:
    """Where the lines of one logger go. A stream that takes nothing fails nobody."""

    _writing = threading.Lock()

    def __init__(self, stream: TextIO, name: str = "root") -> None:
        self._stream = stream
        self.name = name

    def msg(self, line: str) -> None:
        """Writes a line."""
        with suppress(OSError, ValueError), self._writing:
            self._stream.write(f"{line}\n")

    debug = info = warning = error = critical = exception = msg


def _add_name(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["logger"] = logger.name
    return event


def _of_service(service: str) -> Any:
    def add(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        return {"service": service, **event}

    return add


def _cut_text(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {
        key: value[:MAX_TEXT_CHARACTERS] if isinstance(value, str) and len(value) > MAX_TEXT_CHARACTERS else value
        for key, value in event.items()
        if value is not None
    }


def _one_line(event: Any, **options: Any) -> str:
    """ASCII JSON: every control, bidirectional and line-separating character is an escape. JSON itself leaves DEL."""
    return json.dumps(event, ensure_ascii=True, default=repr).replace("\x7f", "\\u007f")
