"""One JSON line for each log event, on standard error, from structlog and from libraries alike. Keeps no file."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final

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
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.add_logger_name,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(serializer=_one_line),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Migrations announce themselves at every start; only what goes wrong there is of interest.
    logging.getLogger("alembic").setLevel(logging.WARNING)


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
