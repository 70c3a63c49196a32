"""Tokens to text that can be shown: whole characters only, and never a part of a stop string. Knows no model.

Both classes hold text back until it is certain, and give it exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What a decoder writes for bytes that are no character, or not one yet.
_REPLACEMENT = "\ufffd"
# A character has at most four bytes, and a token at least one; what is no character by then never becomes one.
_MOST_HELD_TOKENS = 8


class TokenText:
    """Decodes one token after the other. `decode` turns token ids into text, without special tokens."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        # Text before `_given` was given out; `_context` is a little before that, because a decoder treats the first
        # token of a text in its own way (a leading space).
        self._context = 0
        self._given = 0

    def add(self, token_id: int) -> str:
        """The text that is certain now; empty while a character is incomplete."""
        self._ids.append(token_id)
        fresh = self._fresh()
        if fresh.endswith(_REPLACEMENT) and len(self._ids) - self._given <= _MOST_HELD_TOKENS:
            return ""
        if fresh:
            self._context, self._given = self._given, len(self._ids)
        return fresh

    def finish(self) -> str:
        """What is left at the end, without a character that was never completed."""
        return self._fresh().rstrip(_REPLACEMENT)

    def _fresh(self) -> str:
        before = self._decode(self._ids[self._context : self._given])
        return self._decode(self._ids[self._context :])[len(before) :]


class StopFinder:
    """Cuts a text before the first of the stop strings. What might become one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        # The stop string that was found.
        self.found: str | None = None

    def add(self, text: str) -> str:
        """The text that cannot be part of a stop string any more; nothing after `found` is set."""
        if self.found is not None:
            return ""
        self._held += text
        hits = [(position, stop) for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if hits:
            # Of two that begin at one place, the longer.
            position, self.found = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            certain, self._held = self._held[:position], ""
            return certain
        keep = self._longest_beginning()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def finish(self) -> str:
        """What was held back and came to nothing."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
