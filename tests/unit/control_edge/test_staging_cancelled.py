"""A call that is cancelled while its file is being made leaves no file."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from control_service.adapters.blobs.store import DiskBlobStore


async def _endless() -> AsyncIterator[bytes]:
    while True:
        yield b"x"


async def test_a_file_that_was_being_made_is_abandoned(tmp_path: Path) -> None:
    store = DiskBlobStore(directory=tmp_path / "blobs", output_root=tmp_path / "output")
    await store.open()
    for _ in range(20):
        staging = asyncio.create_task(store.stage(_endless(), max_bytes=10**9))
        # The thread has its order; the task has not heard of the file yet.
        await asyncio.sleep(0)
        staging.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await staging
    async with asyncio.timeout(30):
        while list((tmp_path / "blobs" / "staging").iterdir()):  # noqa: ASYNC110 - threads tell nobody
            await asyncio.sleep(0.01)
    await store.close()
