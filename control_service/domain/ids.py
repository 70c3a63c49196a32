"""Makes ULIDs: 48 bits of milliseconds, 80 random bits, Crockford base 32, strictly rising, whatever the clock
does: first in, first out goes by them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
ULID_LENGTH = 26


class UlidSource:
    """Gives out ULIDs; a clock that stands still or goes back never makes them fall."""

    def __init__(
        self,
        now_milliseconds: Callable[[], int],
        *,
        newest: str = "",
        random_bits: Callable[[int], int] = secrets.randbits,
    ) -> None:
        """`newest`: an earlier process' newest ULID, which a clock that was set back must not go below either."""
        self._now_milliseconds = now_milliseconds
        self._random_bits = random_bits
        self._last = 0
        for character in newest:
            self._last = self._last << 5 | _ALPHABET.index(character)
        self._lock = threading.Lock()

    def new_id(self) -> str:
        """Returns the next ULID, 26 characters."""
        fresh = (self._now_milliseconds() << 80) | self._random_bits(80)
        with self._lock:
            # Within one millisecond, or after a clock went back, the next one is simply one more.
            self._last = fresh if fresh >> 80 > self._last >> 80 else self._last + 1
            value = self._last
        return "".join(_ALPHABET[(value >> shift) & 31] for shift in range(125, -5, -5))
