"""One JSON line for each log event, on standard error, from structlog and from libraries alike. Keeps no file."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TextIO

import structlog

_STACKS: Final = structlog.processors.StackInfoRenderer(additional_ignores=[__name__])
# A name or a message from outside must not fill the disk.
MAX_TEXT_CHARACTERS: Final = 8192


def configure_logs(*, service: str, level: str) -> None:
    """Sets up the process; call it once, before the first event."""
    line = _Line(service)
    # Straight to the stream: by way of the standard library a line takes twice as long, and every call has one.
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, _add_name, line],
        logger_factory=partial(_Lines, sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.contextvars.merge_contextvars, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, line],
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


class _Line:
    """The last of the processors, in one: each step of its own would take longer than what it does, and every call has
    a line."""

    # By the name of the logger's method; others are levels themselves.
    _LEVELS: Final = {"exception": "error", "warn": "warning", "fatal": "critical"}
    # ASCII: every control, bidirectional and line-separating character is an escape. JSON itself leaves DEL.
    _encode = json.JSONEncoder(ensure_ascii=True, default=repr).encode

    def __init__(self, service: str) -> None:
        self._service = service

    def __call__(self, logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
        if event.get("stack_info") or event.get("exc_info"):
            event = structlog.processors.format_exc_info(logger, name, _STACKS(logger, name, event))
        line = {"service": self._service}
        for key, value in event.items():
            if value is not None:
                line[key] = value[:MAX_TEXT_CHARACTERS] if isinstance(value, str) else value
        line["level"] = self._LEVELS.get(name, name)
        line["timestamp"] = f"{datetime.now(UTC).replace(tzinfo=None).isoformat()}Z"
        return self._encode(line).replace("\x7f", "\\u007f")
