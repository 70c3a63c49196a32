"""Keeps bytes and the records that name them in step. Content is deleted only when no record names it, and a record is
written only while its content is there; both under one lock, since the two live in different stores."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress
from weakref import WeakKeyDictionary

import structlog

from control_service.app.ports import BlobStore, EventCodec
from control_service.app.store_ports import Store, Transaction
from control_service.domain.errors import Internal
from control_service.domain.event import ArtifactFact, EventKind
from control_service.domain.job import Job
from control_service.domain.job_state import ON_NODE
from control_service.domain.run import RunState

_log = structlog.get_logger(__name__)

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


async def free_forgotten(*, store: Store, blobs: BlobStore, codec: EventCodec) -> int:
    """Deletes every blob that no record names: what a process left that died between bytes and record, or between a
    deleted record and its bytes. To be called at start, before anything else writes; gives how many were deleted.

    Artifacts that are being collected are named by events alone; what of them is here already need not come again.
    """
    wanted = await store.read(lambda tx: _being_collected(tx, codec))
    forgotten = set(await blobs.list_all()) - wanted
    unnamed = await store.read(lambda tx: [s for s in sorted(forgotten) if not tx.datasets.content_is_used(s)])
    freed_bytes = 0
    for sha256 in unnamed:
        freed_bytes += await blobs.delete(sha256)
    if unnamed:
        _log.info("forgotten-blobs-deleted", num_blobs=len(unnamed), freed_bytes=freed_bytes)
    return len(unnamed)


def _being_collected(tx: Transaction, codec: EventCodec) -> set[str]:
    found: set[str] = set()
    for job in tx.jobs.in_states(ON_NODE):
        if job.run_state is RunState.SUCCEEDED:
            found |= artifact_contents(tx, job, codec)
    return found


def artifact_contents(tx: Transaction, job: Job, codec: EventCodec) -> set[str]:
    """Content of the artifacts that the job's current attempt told of; events that cannot be read name none."""
    found: set[str] = set()
    for event in tx.events.of_kind(job.job_id, attempt=job.attempt, kind=EventKind.ARTIFACT):
        with suppress(Internal):
            fact = codec.decode(event.kind, event.payload)
            if isinstance(fact, ArtifactFact):
                found.update(file.sha256 for file in fact.files)
    return found


async def all_are_there(sha256s: Collection[str], *, blobs: BlobStore) -> bool:
    """True when control has every one of the contents. To be asked while `naming` is held."""
    for sha256 in sha256s:
        if not await blobs.has(sha256):
            return False
    return True
