"""Asks nodes for a plan, one after the other: a device that is too small on one node says nothing about the next."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from control_service.app.ports import NodeClient
from control_service.domain.errors import DeadlineTooShort, TunesmithError, Unavailable

# What the next node may do though this one cannot.
_ANOTHER_NODE_MAY: frozenset[str] = frozenset({"DOES_NOT_FIT", "NODE_BUSY"})

Plan = Mapping[str, Any]


async def ask_in_turn(
    candidates: Sequence[tuple[str, NodeClient]], ask: Callable[[NodeClient], Awaitable[Plan]], *, passes_silent: bool
) -> tuple[str, Plan] | None:
    """The first plan with the name of its node; None when every node was silent or there is none.

    Raises what the first node refused with, when every node that answered refused because of its memory, and any other
    refusal at once. `passes_silent`: a node that does not answer is passed over, else its error is raised.
    """
    refusal: TunesmithError | None = None
    for name, client in candidates:
        try:
            return name, await ask(client)
        except (Unavailable, DeadlineTooShort):
            if not passes_silent:
                raise
        except TunesmithError as error:
            if error.reason not in _ANOTHER_NODE_MAY:
                raise
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    return None
