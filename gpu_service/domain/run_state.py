"""The run's state machine on its node: states and the transitions between them, as one table. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType


class RunState(IntEnum):
    """Names and numbers are those of the wire's `RunState`; journals hold the numbers."""

    ACCEPTED = 1
    RUNNING = 2
    STOPPING = 3
    SUCCEEDED = 4
    FAILED = 5
    CANCELLED = 6
    INTERRUPTED = 7


_ENDS = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED, RunState.INTERRUPTED})

# A run may end from ACCEPTED: it was stopped, or its engine was lost, before an engine had it. A stop may come too
# late: STOPPING reaches every end.
TRANSITIONS: Mapping[RunState, frozenset[RunState]] = MappingProxyType(
    {
        RunState.ACCEPTED: frozenset({RunState.RUNNING, RunState.STOPPING}) | _ENDS - {RunState.SUCCEEDED},
        RunState.RUNNING: frozenset({RunState.STOPPING}) | _ENDS,
        RunState.STOPPING: _ENDS,
        RunState.SUCCEEDED: frozenset(),
        RunState.FAILED: frozenset(),
        RunState.CANCELLED: frozenset(),
        RunState.INTERRUPTED: frozenset(),
    }
)

TERMINAL_STATES = frozenset(state for state, following in TRANSITIONS.items() if not following)


def shown_state(recorded: RunState, *, stop_requested: bool) -> RunState:
    """The state that is told: what the journal says, but STOPPING while a stop is being carried out."""
    return RunState.STOPPING if stop_requested and recorded not in TERMINAL_STATES else recorded
