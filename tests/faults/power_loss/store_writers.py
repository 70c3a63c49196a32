"""What a node stores for runs to come, as writers whose every moment the power may go: blobs, plans, what was measured
of memory. Recovery is the product's own."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from gpu_service.domain.errors import Refusal
from gpu_service.planner.staging import stage_directory
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.memory_records import MemoryRecords
from gpu_service.shim import durable_json
from tests.faults.power_loss.harness import Acknowledged, Writer, highest_number

_CONTENT = b"rows\n" * 40


# Blobs of a node.


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    """As an upload brings them."""
    for start in range(0, len(data), 64):
        yield data[start : start + 64]


def _push_blobs(root: Path, acknowledge: Acknowledged) -> None:
    for number, data in enumerate((_CONTENT, _CONTENT[1:]), start=1):
        durable_json.make_directory(root / "blobs")
        digest = hashlib.sha256(data).hexdigest()
        store = BlobStore(root / "blobs")
        asyncio.run(store.write(sha256=digest, size_bytes=len(data), offset=0, chunks=chunks(data)))
        acknowledge(f"pushed:{number}")


def _blob_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    directory = root / "blobs"
    directory.mkdir(exist_ok=True)
    store = BlobStore(directory)
    for number, data in enumerate((_CONTENT, _CONTENT[1:]), start=1):
        digest = hashlib.sha256(data).hexdigest()
        missing = asyncio.run(store.find_missing([digest]))
        if not missing:
            if store.path(digest).read_bytes() != data:
                yield f"blob {number} is there and not whole"
            continue
        if number <= highest_number(acknowledged, "pushed"):
            yield f"blob {number} was pushed and is gone"
        # The next push goes on from what is here, or begins anew where that is not what was sent.
        for offset in (missing[0][1], 0):
            rest = chunks(data[offset:])
            try:
                asyncio.run(store.write(sha256=digest, size_bytes=len(data), offset=offset, chunks=rest))
                break
            except Refusal as refusal:
                if offset == 0:
                    yield f"blob {number} cannot be pushed again: {refusal}"
        if store.path(digest).read_bytes() != data:
            yield f"blob {number} was pushed again and is not whole"


# Plans and token shards.


def _is_whole_plan(directory: Path) -> bool:
    return (directory / "plan.json").exists()


def _plan(root: Path, acknowledge: Acknowledged) -> None:
    with stage_directory(root / "plans" / "digest", is_whole=_is_whole_plan) as staged:
        (staged / "selection.bin").write_bytes(bytes(range(200)))
        (staged / "plan.json").write_text(json.dumps({"num_steps": 3}))
    acknowledge("planned:1")


def _plan_problems(root: Path, _acknowledged: frozenset[str]) -> Iterator[str]:
    # One that is gone is planned again.
    directory = root / "plans" / "digest"
    if _is_whole_plan(directory):
        if durable_json.read(directory / "plan.json") != {"num_steps": 3}:
            yield "the plan is not whole"
        if (directory / "selection.bin").read_bytes() != bytes(range(200)):
            yield "the selection is not whole"


# What was measured of memory.


def _measure(root: Path, acknowledge: Acknowledged) -> None:
    records = MemoryRecords(root / "memory.json")
    for number in (1, 2):
        asyncio.run(records.observe("kind", analytic_bytes=100 * number, peak_bytes=90 * number))
        acknowledge(f"measured:{number}")


def _measured_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    cells = MemoryRecords(root / "memory.json").of_kind("kind").get("kind", [])
    if len(cells) < highest_number(acknowledged, "measured"):
        yield f"{len(cells)} measurements are there"


STORE_WRITERS: tuple[Writer, ...] = (
    # One that a killed server had not synced is found missing and pushed again.
    Writer(name="node-blobs", promise="R19", act=_push_blobs, problems=_blob_problems, can_be_killed=False),
    Writer(name="plans", promise="R19", act=_plan, problems=_plan_problems),
    Writer(name="memory-records", promise="R1", act=_measure, problems=_measured_problems),
)
