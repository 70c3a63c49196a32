"""Admission by itself, with devices and libraries as the test says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gpu_service.devices import Device
from gpu_service.doctor import Problem
from gpu_service.domain.errors import Refusal
from gpu_service.domain.memory import MemoryLedger
from gpu_service.runs.admission import Admission, Admitted
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.memory_records import MemoryRecords
from gpu_service.runs.models import ModelShelf
from gpu_service.runs.node_files import NodeFiles
from gpu_service.runs.planner_process import PlannerProcess
from gpu_service.runs.planning import Planning
from tests.fakes.datasets import make_spec, write_blob
from tests.fakes.tiny_models import place_header_only

GIB = 1 << 30


def gpu(index: int, *, free_bytes: int = 80 * GIB, total_bytes: int = 80 * GIB, quarantine_reason: str = "") -> Device:
    return Device(
        index=index,
        type="cuda",
        name="a GPU",
        total_memory_bytes=total_bytes,
        free_memory_bytes=free_bytes,
        compute_capability="9.0",
        quarantine_reason=quarantine_reason,
    )


class Node:
    """An admission over fake devices and real files."""

    def __init__(self, root: Path, devices: Sequence[Device], problems: Sequence[Problem] = ()) -> None:
        files = NodeFiles(root / "node", root / "models")
        files.prepare()
        place_header_only(files.models, name="org/name")
        dataset = write_blob(files.blobs, 1, [{"prompt": "a", "completion": "b"}] * 4, "prompt-completion")
        self.spec = make_spec([dataset], base_model="org/name", training_type="lora")
        self.ledger = MemoryLedger()
        self.evictable_bytes = 0
        # Not known.
        self.host_memory_bytes = 0
        memory = MemoryRecords(files.memory_records)
        models = ModelShelf(files.models, cache_file=files.cache / "digests.json")
        self.admission = Admission(
            planning=Planning(
                files=files,
                models=models,
                blobs=BlobStore(files.blobs),
                planner=PlannerProcess(files.requests),
                versions={},
                memory=memory,
            ),
            ledger=self.ledger,
            list_devices=lambda: devices,
            problems=problems,
            evictable_bytes=lambda device_id: self.evictable_bytes,
            host_memory_bytes=lambda: self.host_memory_bytes,
        )

    async def admit(self, run_id: str = "a/1", leaving: Sequence[str] = (), begun_by: str = "") -> Admitted:
        return await self.admission.admit(
            run_id=run_id,
            spec=self.spec,
            spec_digest="d",
            weights_digest="",
            leaving_run_ids=leaving,
            begun_by=begun_by,
        )


async def test_a_run_is_admitted_by_what_trains_it(tmp_path: Path) -> None:
    """Which may be what trained it before: the libraries need more memory."""
    node = Node(tmp_path, [gpu(0), gpu(1), gpu(2)])
    admitted = [await node.admit(f"{by}/1", begun_by=by) for by in ("", "fast", "reference")]
    assert [one.trainer for one in admitted] == ["fast", "fast", "reference"]
    kinds = [one.kind_of_run.split("/") for one in admitted]
    assert ["fast" in kind for kind in kinds] == [True, True, False]
    assert ["reference" in kind for kind in kinds] == [False, False, True]


async def test_runs_go_to_free_devices_until_there_is_none(tmp_path: Path) -> None:
    node = Node(tmp_path, [gpu(0, quarantine_reason="held"), gpu(1), gpu(2)])
    assert (await node.admit("a/1")).device.index == 1
    assert (await node.admit("b/1")).device.index == 2
    assert not await node.admission.has_room()
    with pytest.raises(Refusal, match="NODE_BUSY"):
        await node.admit("c/1")
    # A run on its way out makes room for its successor.
    assert (await node.admit("a/2", leaving=["a/1"])).device.index == 1
    assert node.ledger.holder_of("cuda:1") == "a/2"


async def test_a_run_that_may_not_fit_gets_the_device_with_the_most_memory(tmp_path: Path) -> None:
    """Whatever its examples' length turns out to be; one that fits surely leaves the larger device to others."""
    devices = [gpu(0, free_bytes=2 * GIB, total_bytes=2 * GIB), gpu(1, free_bytes=8 * GIB, total_bytes=8 * GIB)]
    node = Node(tmp_path, devices)
    node.spec["hyperparameters"] = {"max_length": 64}
    assert (await node.admit("a/1")).device.index == 0
    node.ledger.release("a/1")
    node.spec["hyperparameters"] = {"max_length": 512, "batch": {"examples": 65536}}
    assert (await node.admit("b/1")).device.index == 1


async def test_memory_that_others_hold_is_busy_but_an_idle_base_counts_as_free(tmp_path: Path) -> None:
    node = Node(tmp_path, [gpu(0, free_bytes=1024)])
    with pytest.raises(Refusal) as refused:
        await node.admit()
    assert refused.value.reason in ("NODE_BUSY", "DOES_NOT_FIT")
    assert node.ledger.holder_of("cuda:0") is None
    node.evictable_bytes = 60 * GIB
    assert (await node.admission.devices())[0].free_memory_bytes == 60 * GIB + 1024
    await node.admit()


async def test_a_node_with_a_broken_library_trains_nothing(tmp_path: Path) -> None:
    problem = Problem(library="transformers", version="4.57.2", reason="broken", install="transformers>=5")
    node = Node(tmp_path, [gpu(0)], [problem])
    with pytest.raises(Refusal) as refused:
        await node.admit()
    assert refused.value.reason == "LIBRARY_KNOWN_BAD"
    assert refused.value.details == {"library": "transformers", "version": "4.57.2", "install": "transformers>=5"}
    assert not await node.admission.has_room()


async def test_a_node_without_a_usable_device_says_why(tmp_path: Path) -> None:
    node = Node(tmp_path, [gpu(0, quarantine_reason="memory could not be freed")])
    with pytest.raises(Refusal) as refused:
        await node.admission.planning_device()
    assert refused.value.reason == "DEVICE_UNSUPPORTED"
    assert refused.value.details == {"cuda:0": "memory could not be freed"}
