"""Counts, promise by promise, what the checks of one evidence directory tried and what did not hold. Judges nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tests.faults.scenario import Finding

# What is said of one promise is meant to be read.
_MAX_VIOLATIONS = 50


class Tally:
    """The checks write into it; `findings` says what came of them."""

    def __init__(self) -> None:
        self._tried: Counter[str] = Counter()
        self._broken: Counter[str] = Counter()
        self._violations: dict[str, list[str]] = {}

    def expect(self, promise: str, holds: bool, violation: str) -> bool:
        """One thing that a promise says; gives `holds`. `violation` is what to say when it does not."""
        self._tried[promise] += 1
        if not holds:
            self._broken[promise] += 1
            said = self._violations.setdefault(promise, [])
            if len(said) < _MAX_VIOLATIONS:
                said.append(violation)
        return holds

    def findings(self) -> list[Finding]:
        """One of each promise that was tried, by number."""
        return [
            Finding(
                promise=promise,
                tried=self._tried[promise],
                held=self._tried[promise] - self._broken[promise],
                violations=tuple(self._violations.get(promise, ())),
            )
            for promise in by_number(self._tried)
        ]


def by_number(promises: Iterable[str]) -> list[str]:
    """Promises as docs/operations.md orders them."""
    return sorted(promises, key=lambda promise: int(promise.removeprefix("R")))
