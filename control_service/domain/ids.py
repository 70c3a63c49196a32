"""Makes ULIDs: 48 bits of milliseconds, 80 random bits, Crockford base 32, strictly rising within one process."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
ULID_LENGTH = 26


class UlidSource:
    """Gives out ULIDs; a clock that stands still or goes back never makes them fall."""

    def __init__(self, now_milliseconds: Callable[[], int]) -> None:
        self._now_milliseconds = now_milliseconds
        self._last = 0
        self._lock = threading.Lock()

    def new_id(self) -> str:
        """Returns the next ULID, 26 characters."""
        fresh = (self._now_milliseconds() << 80) | secrets.randbits(80)
        with self._lock:
            # Within one millisecond, or after a clock went back, the next one is simply one more.
            self._last = fresh if fresh >> 80 > self._last >> 80 else self._last + 1
            value = self._last
        return "".join(_ALPHABET[(value >> shift) & 31] for shift in range(125, -5, -5))
