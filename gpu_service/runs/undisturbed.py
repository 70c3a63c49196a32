"""Carries a small piece of work to its end whatever becomes of who asked for it. Refuses to be for anything long."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def undisturbed(work: Coroutine[Any, Any, T]) -> T:
    """Does work to its end even when the caller is cancelled, who hears of the cancellation only then.

    A cancelled `to_thread` alone leaves its thread at work: what is cleaned up meanwhile it would write again.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
