"""Keeps bytes and the records that name them in step. Content is deleted only when no record names it, and a record is
written only while its content is there; both under one lock, since the two live in different stores."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from weakref import WeakKeyDictionary

from control_service.app.ports import BlobStore
from control_service.app.store_ports import Store

# One lock for each blob store of the process.
_LOCKS: WeakKeyDictionary[BlobStore, asyncio.Lock] = WeakKeyDictionary()


def naming(blobs: BlobStore) -> asyncio.Lock:
    """Held from making sure that content is there until the record that names it is committed."""
    return _LOCKS.setdefault(blobs, asyncio.Lock())


async def free_unnamed(sha256s: Collection[str], *, store: Store, blobs: BlobStore) -> None:
    """Deletes those of the contents that no record names."""
    if not sha256s:
        return
    async with naming(blobs):
        unnamed = await store.read(lambda tx: [s for s in sha256s if not tx.datasets.content_is_used(s)])
        for sha256 in unnamed:
            await blobs.delete(sha256)


async def all_are_there(sha256s: Collection[str], *, blobs: BlobStore) -> bool:
    """True when control has every one of the contents. To be asked while `naming` is held."""
    for sha256 in sha256s:
        if not await blobs.has(sha256):
            return False
    return True
