"""How much of a caller's deadline a node may take. Sets no limit of its own."""

from __future__ import annotations

from typing import Any, Final

# Left of a caller's deadline for the way back when a node answers.
_ANSWER_SECONDS: Final = 0.5


def seconds_for_nodes(context: Any) -> float | None:
    """What of the caller's deadline a node may take; None when the caller set none."""
    remaining = context.time_remaining()
    # Of a short one half, so that there is time to ask and time to answer.
    return None if remaining is None else max(remaining - _ANSWER_SECONDS, remaining / 2)
