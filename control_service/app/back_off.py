"""Growing pauses between tries, back to the first after a success."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BackOffConfig:
    """Pauses double from the first to the longest."""

    initial_seconds: float = 0.2
    max_seconds: float = 5.0


class BackOff:
    """Counts its own tries; waits for nobody."""

    def __init__(self, config: BackOffConfig) -> None:
        self._config = config
        self._next_seconds = config.initial_seconds

    def next_seconds(self) -> float:
        """The pause before the next try."""
        seconds = self._next_seconds
        self._next_seconds = min(self._config.max_seconds, seconds * 2.0)
        return seconds

    def reset(self) -> None:
        """Something went well."""
        self._next_seconds = self._config.initial_seconds
