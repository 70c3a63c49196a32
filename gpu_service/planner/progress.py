"""What the planner says while it works: JSON lines on a stream, at most ten a second. Interprets nothing."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

_INTERVAL_SECONDS = 0.1


class Progress:
    """Counts examples towards a total and says so; the last one always is."""

    def __init__(self, stream: TextIO, *, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._total = total
        self._done = 0
        self._said = -1
        self._next_at = 0.0

    def advance(self, count: int) -> None:
        """`count` more examples are done."""
        self._done += count
        now = self._clock()
        if now >= self._next_at:
            self._next_at = now + _INTERVAL_SECONDS
            self._say()

    def finish(self) -> None:
        """Everything is done, whatever number of examples was registered."""
        self._total = self._done
        if self._said != self._done:
            self._say()

    def _say(self) -> None:
        self._said = self._done
        total = max(self._total, self._done)
        write_line(self._stream, {"type": "progress", "unit": "examples", "done": self._done, "total": total})


def write_line(stream: TextIO, message: Mapping[str, Any]) -> None:
    """One message as one line, sent at once."""
    stream.write(json.dumps(message, separators=(",", ":")) + "\n")
    stream.flush()
