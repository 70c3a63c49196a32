"""One JSON line for each log event, on standard error, from structlog and from libraries alike. Keeps no file."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import structlog

# A name or a message from outside must not fill the disk.
_MAX_TEXT_LENGTH = 8192


def configure(service: str) -> None:
    """Set the process up; call it once, before the first event."""
    chain: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _finish(service),
    ]
    structlog.configure(
        processors=[*chain, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=chain,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(serializer=_one_line),
            ],
        )
    )
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.INFO)


def _finish(service: str) -> Any:
    def finish(logger: Any, name: str, event: dict[str, Any]) -> dict[str, Any]:
        cut = {
            key: value[:_MAX_TEXT_LENGTH] if isinstance(value, str) else value
            for key, value in event.items()
            if value is not None
        }
        return {"service": service, **cut}

    return finish


def _one_line(event: Any, **options: Any) -> str:
    """ASCII JSON: every character that could fool a terminal or a reader of lines is an escape. JSON leaves DEL."""
    return json.dumps(event, ensure_ascii=True, default=repr).replace("\x7f", "\\u007f")
