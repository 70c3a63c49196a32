"""What the suite makes of a small trial's findings: every promise held, but for those that need a quiet machine."""

from __future__ import annotations

from collections.abc import Iterable

from tests.faults.scenario import Finding

# Promises that compare times with a limit; a machine that does other things at the time is no witness.
_TIMED = frozenset({"R5", "R6"})


def expect_held(findings: Iterable[Finding]) -> None:
    """AssertionError with what did not hold."""
    broken = [finding for finding in findings if finding.held != finding.tried]
    assert not [finding for finding in broken if finding.worst is None or finding.promise not in _TIMED], broken
