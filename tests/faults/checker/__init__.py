"""The offline checker: reads what a trial left and decides every promise after the fact.

Imports nothing of either service, so that a mistake of theirs is not its own too: it has its own reader of journals,
its own table of states, and plain SQL. `python -m tests.faults.checker <evidence directory>` prints what it found.

`scenario.json` may say of a trial: `all_over` (every job must have ended), `compacted` (logs may begin after 1),
`watches_end_early` (consumers left on purpose). A fault of kind `twin` tells `status` and `first_alive`. All times are
of one monotonic clock. Journals are there to be compared only where control does not release runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.faults.checker.contents import check_artifacts, check_checkpoints
from tests.faults.checker.creates import check_creates, check_request_ids
from tests.faults.checker.evidence import Evidence, read_evidence
from tests.faults.checker.log_order import check_against_journals, check_attempts, check_numbers
from tests.faults.checker.recovery import check_adoptions, check_jobs_end_well, check_resumes, check_vanished
from tests.faults.checker.states import check_answers, check_cancels, check_outcomes, check_transitions
from tests.faults.checker.tally import Tally
from tests.faults.checker.watchers import check_twins, check_watches
from tests.faults.scenario import Finding

_CHECKS: tuple[Callable[[Evidence, Tally], None], ...] = (
    check_creates,
    check_request_ids,
    check_numbers,
    check_against_journals,
    check_attempts,
    check_transitions,
    check_answers,
    check_outcomes,
    check_cancels,
    check_jobs_end_well,
    check_vanished,
    check_resumes,
    check_adoptions,
    check_watches,
    check_twins,
    check_checkpoints,
    check_artifacts,
)


def check(directory: Path) -> list[Finding]:
    """One finding of each promise that the evidence says anything about. Raises OSError, ValueError for evidence that
    cannot be read; the processes that wrote it must not run any more."""
    evidence, tally = read_evidence(directory), Tally()
    for one in _CHECKS:
        one(evidence, tally)
    return tally.findings()
