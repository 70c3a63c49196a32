"""Accepting a run while other things happen; no engine is ever started here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_service.devices import read_cpu
from gpu_service.domain.errors import Refusal
from gpu_service.domain.memory import MemoryLedger
from gpu_service.runs.admission import Admission, Admitted
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.engine_directories import EngineSettings
from gpu_service.runs.engine_pool import EnginePool
from gpu_service.runs.manager import RunManager, StartRequest
from gpu_service.runs.memory_records import MemoryRecords
from gpu_service.runs.models import ModelShelf
from gpu_service.runs.node_files import NodeFacts, NodeFiles, RunKey
from gpu_service.runs.planner_process import PlannerProcess
from gpu_service.runs.planning import Planning
from tests.fakes.datasets import make_spec, write_blob
from tests.fakes.tiny_models import place_header_only

KEY = RunKey(installation_id="i", job_id="01JOB", attempt=3)


class BusyAdmission(Admission):
    """Something else happens while the weights are read."""

    meanwhile: Callable[[], None]

    async def admit(self, **what: Any) -> Admitted:
        self.meanwhile()
        return await super().admit(**what)


class Node:
    """A manager over real files."""

    def __init__(self, root: Path) -> None:
        self.files = files = NodeFiles(root / "node", root / "models")
        files.prepare()
        place_header_only(files.models, name="org/name")
        dataset = write_blob(files.blobs, 1, [{"prompt": "a", "completion": "b"}] * 4, "prompt-completion")
        self.spec = make_spec([dataset], base_model="org/name", training_type="lora")
        self.ledger = MemoryLedger()
        self.blobs = BlobStore(files.blobs)
        memory = MemoryRecords(files.memory_records)
        models = ModelShelf(files.models, cache_file=files.cache / "digests.json")
        planner = PlannerProcess(files.requests)
        planning = Planning(files=files, models=models, blobs=self.blobs, planner=planner, versions={}, memory=memory)
        settings = EngineSettings(
            command=("/nothing",), orphan_limit_seconds=1, grace_seconds=1, idle_seconds=1, hang_limit_seconds=1
        )
        pool = EnginePool(directory=files.engines, settings=settings)
        self.admission = BusyAdmission(
            planning=planning,
            ledger=self.ledger,
            list_devices=lambda: [read_cpu()],
            problems=[],
            evictable_bytes=pool.resident_bytes,
        )
        self.manager = RunManager(
            files=files,
            facts=files.read_facts("local"),
            admission=self.admission,
            ledger=self.ledger,
            memory=memory,
            blobs=self.blobs,
            pool=pool,
            planning=planning,
            grace_seconds=1,
            cache_max_bytes=1 << 30,
        )

    def leave_ended_run(self) -> None:
        """What a former server and its engine left of a run that is over."""
        content = {"installation_id": "i", "job_id": KEY.job_id, "attempt": 3, "spec_digest": "d", "spec": self.spec}
        content |= {"weights_digest": "w", "device": {"type": "cpu", "index": -1}, "quantization": "", "resume": None}
        directory = self.files.write_run(KEY, content)
        # Over, so that it may be released before anything else writes the node's facts.
        ending = {"status": 0, "signal": None, "phase": "", "run_directory": str(directory), "stop_mode": "cancel"}
        engine = self.files.engines / "e1"
        engine.mkdir()
        (engine / "engine.json").write_text(
            json.dumps(
                {
                    "argv": ["x"],
                    "environment": {},
                    "device": {"type": "cpu", "index": -1},
                    "limits": {"orphan_limit_seconds": 1, "grace_seconds": 1},
                }
            )
        )
        (engine / "exit.json").write_text(json.dumps(ending))


async def test_a_drain_that_begins_during_admission_refuses_the_run(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.admission.meanwhile = node.manager.begin_draining
    request = StartRequest(key=KEY, spec_digest="d", spec=node.spec, weights_digest="", resume=None)
    with pytest.raises(Refusal, match="NODE_DRAINING"):
        await node.manager.start(request)
    assert node.ledger.holder_of("cpu:-1") is None
    assert node.files.read_runs() == []
    await node.manager.close()


async def test_an_attempt_that_only_its_run_knows_is_fenced_for_good(tmp_path: Path) -> None:
    """The server ended between the run's file and its own: from the next start on both know it."""
    node = Node(tmp_path)
    node.leave_ended_run()
    await node.manager.open()
    assert node.manager.get(KEY).is_over
    await node.manager.release(KEY)
    await node.manager.close()
    facts = node.files.read_facts("local")
    assert facts == NodeFacts(name="local", installation_id="i", highest_attempts={KEY.job_id: 3})


async def test_a_run_that_is_over_is_not_in_the_way_while_it_is_being_settled(tmp_path: Path) -> None:
    """Its engine has let go of it, and the device is still booked for it: the next run is accepted all the same."""
    node = Node(tmp_path)
    node.admission.meanwhile = lambda: None
    node.leave_ended_run()
    await node.manager.open()
    node.ledger.reserve(run_id=KEY.id, device_id="cpu:-1", num_bytes=0, capacity_bytes=0)
    key = RunKey(installation_id="i", job_id="01NEXT", attempt=1)
    run = await node.manager.start(
        StartRequest(key=key, spec_digest="d", spec=node.spec, weights_digest="", resume=None)
    )
    assert run.key == key
    assert node.ledger.holder_of("cpu:-1") == key.id
    await node.manager.close()


async def test_a_run_that_keeps_its_device_after_all_holds_what_it_needs_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds of the host's memory changed while its successor was booked instead."""
    node = Node(tmp_path)
    node.admission.meanwhile = node.manager.begin_draining
    node.leave_ended_run()
    await node.manager.open()
    node.ledger.reserve(run_id=KEY.id, device_id="cpu:-1", num_bytes=0, capacity_bytes=0, host_bytes=100)
    monkeypatch.setattr(node.manager._launcher, "needs_device", lambda run: True)
    key = RunKey(installation_id="i", job_id="01NEXT", attempt=1)
    with pytest.raises(Refusal, match="NODE_DRAINING"):
        await node.manager.start(StartRequest(key=key, spec_digest="d", spec=node.spec, weights_digest="", resume=None))
    assert node.ledger.holder_of("cpu:-1") == KEY.id
    assert node.ledger.host_bytes_beside() == node.manager.get(KEY).host_bytes == 0
    await node.manager.close()


def _starting_spec(node: Node, **start: Any) -> dict[str, Any]:
    adapter = b"weights"
    sha256 = hashlib.sha256(adapter).hexdigest()
    files = [{"path": "adapter_model.safetensors", "sha256": sha256, "size_bytes": str(len(adapter))}]
    return {**node.spec, "start_from": {"job_id": "01EARLIER", "name": "adapter", "files": files, **start}}


async def test_a_start_from_an_earlier_job_needs_its_bytes_and_keeps_them(tmp_path: Path) -> None:
    """They are linked into the run's directory: whatever the cache deletes, the run has them."""
    node = Node(tmp_path)
    node.admission.meanwhile = lambda: None
    spec = _starting_spec(node)
    request = StartRequest(key=KEY, spec_digest="d", spec=spec, weights_digest="", resume=None)
    with pytest.raises(Refusal, match="BLOB_NOT_FOUND") as refused:
        await node.manager.start(request)
    (file,) = spec["start_from"]["files"]
    assert refused.value.details["sha256"] == file["sha256"]
    assert node.files.read_runs() == []

    blob = node.blobs.path(file["sha256"])
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(b"weights")
    run = await node.manager.start(request)
    blob.unlink()
    content = json.loads((run.directory / "run.json").read_text())
    assert content["start_from"] == {"directory": str(run.directory / "start"), "name": "adapter"}
    assert content["trainer"] == "reference"
    assert (run.directory / "start/adapter_model.safetensors").read_bytes() == b"weights"
    await node.manager.close()


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        ({"name": "../adapter"}, "INVALID_FIELD"),
        ({"files": []}, "INVALID_FIELD"),
        ({"files": [{"path": "../../run.json", "sha256": "0" * 64}]}, "PATH_NOT_ALLOWED"),
    ],
)
async def test_a_start_that_leaves_its_directory_is_refused(start: dict[str, Any], reason: str, tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.admission.meanwhile = lambda: None
    for file in start.get("files", ()):
        blob = node.blobs.path(file["sha256"])
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(b"{}")
    spec = _starting_spec(node, **start)
    blob = node.blobs.path(hashlib.sha256(b"weights").hexdigest())
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(b"weights")
    with pytest.raises(Refusal, match=reason):
        await node.manager.start(StartRequest(key=KEY, spec_digest="d", spec=spec, weights_digest="", resume=None))
    assert node.files.read_runs() == []
    await node.manager.close()
