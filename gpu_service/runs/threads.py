"""Blocking work in a thread that is never left behind. Refuses to give up halfway: a cancelled caller waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def finish_in_thread(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """As `asyncio.to_thread`, but a cancelled caller goes on only when the thread is done with what it was given.

    A file descriptor that was closed under a writing thread may be another file by the time it writes.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **options))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
