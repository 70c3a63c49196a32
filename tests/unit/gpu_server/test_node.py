"""The server's rooms without a server: doctor, errors, durable facts, blobs, files of runs, wake-ups."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from gpu_service import doctor
from gpu_service.api.errors import _CODES, status_of
from gpu_service.domain.errors import Fault, Refusal
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.manifests import FileReference
from gpu_service.runs.node_files import NodeFacts, NodeFiles, RunKey
from gpu_service.runs.run_files import ResumeRequest, find_file, prepare_resume, remove_tree
from gpu_service.runs.signal import Signal, wait_for
from gpu_service.runs.threads import finish_in_thread
from gpu_service.shim import durable_json
from tunesmith.common.v1 import errors_pb2

GOOD = dict.fromkeys(doctor.REQUIRED, "99")


def test_the_doctor_names_what_is_broken_and_what_to_install() -> None:
    assert doctor.find_problems(GOOD) == []
    [problem] = doctor.find_problems({**GOOD, "transformers": "4.57.2"})
    assert "42374" in problem.reason
    assert problem.install
    for version in ("4.57.1", "4.57.3", "5.23.0"):
        assert doctor.find_problems({**GOOD, "transformers": version}) == []
    [missing] = doctor.find_problems({name: version for name, version in GOOD.items() if name != "peft"})
    assert (missing.library, missing.version) == ("peft", "")


@pytest.mark.parametrize(("broken", "code"), [({}, 0), ({"transformers": "4.57.2"}, 1)])
def test_the_doctor_as_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: dict[str, str], code: int
) -> None:
    monkeypatch.setattr(doctor, "read_versions", lambda: {**GOOD, **broken})
    assert doctor.main(["--output", "json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    assert doctor.main([]) == code
    assert ("PROBLEM" in capsys.readouterr().out) == bool(code)


def test_the_error_table_names_only_reasons_of_the_contract() -> None:
    known = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert set(_CODES) <= known


def test_a_refusal_is_told_with_reason_field_and_when_to_try_again() -> None:
    status = status_of(Refusal("INVALID_FIELD", Fault.USER, "no", field="spec.x", file="f", details={"a": "b"}))
    assert status.code is grpc.StatusCode.INVALID_ARGUMENT
    [(_, raw)] = status.trailing_metadata
    assert error_details_pb2.ErrorInfo.DESCRIPTOR.full_name.encode() in raw
    assert error_details_pb2.BadRequest.DESCRIPTOR.full_name.encode() in raw
    busy = status_of(Refusal("NODE_BUSY", Fault.PLATFORM, "later"))
    assert busy.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_details_pb2.RetryInfo.DESCRIPTOR.full_name.encode() in busy.trailing_metadata[0][1]


def test_node_facts_survive(tmp_path: Path) -> None:
    files = NodeFiles(tmp_path / "node", tmp_path / "models")
    files.prepare()
    facts = files.read_facts("local")
    assert facts == NodeFacts(name="local")
    later = facts.with_attempt(RunKey(installation_id="i", job_id="j", attempt=3))
    files.write_facts(later)
    assert files.read_facts("local") == later
    assert facts.highest_attempts == {}


def test_the_base_of_the_newest_run_is_likely_to_be_wanted(tmp_path: Path) -> None:
    files = NodeFiles(tmp_path / "node", tmp_path / "models")
    files.prepare()
    assert files.find_likely_model() == ""
    older, newer = tmp_path / "models/org/older", tmp_path / "models/org/newer"
    for number, directory in enumerate((older, newer)):
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        os.utime(directory / "config.json", (number, number))
    assert files.find_likely_model() == str(newer)
    for number, directory in enumerate((newer, older)):
        path = files.write_run(
            RunKey(installation_id="i", job_id=f"job{number}", attempt=1), {"model_directory": str(directory)}
        )
        os.utime(path / "run.json", (number, number))
    assert files.find_likely_model() == str(older)
    shutil.rmtree(older)
    assert files.find_likely_model() == str(newer)
    # A hint: what cannot be read keeps no node from starting.
    for content in ("{}", "{"):
        path.joinpath("run.json").write_text(content)
        os.utime(path / "run.json", (9, 9))
        assert files.find_likely_model() in ("", str(newer))


def test_what_is_not_accepted_is_no_run_any_more_before_anything_else_of_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = NodeFiles(tmp_path / "node", tmp_path / "models")
    files.prepare()
    key = RunKey(installation_id="i", job_id="j", attempt=1)
    (files.run_directory(key) / "resume").mkdir(parents=True)
    directory = files.write_run(key, {})
    synced: list[list[str]] = []
    monkeypatch.setattr(
        durable_json, "sync_directory", lambda path: synced.append(sorted(entry.name for entry in path.iterdir()))
    )
    files.forget_unaccepted(key)
    assert synced == [["resume"]]
    assert not directory.exists()


def test_what_was_never_accepted_frees_the_disk(tmp_path: Path) -> None:
    files = NodeFiles(tmp_path / "node", tmp_path / "models")
    files.prepare()
    keys = [RunKey(installation_id="i", job_id=job_id, attempt=1) for job_id in ("left", "refused", "kept")]
    for key in keys:
        (files.run_directory(key) / "resume").mkdir(parents=True)
    refused, kept = keys[1:]
    files.write_run(refused, {})
    files.forget_unaccepted(refused)
    files.forget_unaccepted(refused)
    files.write_run(kept, {})
    files.prepare()
    assert [path.name for path in files.runs.iterdir()] == ["kept"]
    assert len(files.read_runs()) == 1
    # What is in the trash still must not keep another run of that name from leaving.
    first = files.discard_run(kept)
    files.write_run(kept, {})
    assert files.discard_run(kept) != first
    assert files.read_runs() == []


@pytest.mark.parametrize("job_id", ["", "..", "a/b", "a\0b", "x" * 65, "\N{SNOWMAN}"])
def test_a_job_id_never_becomes_another_path(job_id: str) -> None:
    with pytest.raises(Refusal, match="INVALID_FIELD"):
        RunKey(installation_id="i", job_id=job_id, attempt=1).check()


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_a_newer_writer_takes_over_from_a_stalled_one(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    content = b"abcdef"
    digest = hashlib.sha256(content).hexdigest()
    written, gate = asyncio.Event(), asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield b"abc"
        # Asked for more: the first chunk is on the disk.
        written.set()
        await gate.wait()
        yield b"XXX"

    first = asyncio.create_task(store.write(sha256=digest, size_bytes=6, offset=0, chunks=stalled()))
    await written.wait()
    assert await store.find_missing([digest]) == [(digest, 3)]
    assert await store.write(sha256=digest, size_bytes=6, offset=3, chunks=stream(b"def")) == 6
    gate.set()
    with pytest.raises(Refusal, match="OFFSET_MISMATCH"):
        await first
    assert store.path(digest).read_bytes() == content


async def test_an_older_writer_whose_stream_ends_does_not_judge_a_newer_ones_bytes(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    content = b"abcdef"
    digest = hashlib.sha256(content).hexdigest()
    written, gate, newer_written, newer_gate = (asyncio.Event() for _ in range(4))

    async def halting(chunk: bytes, reached: asyncio.Event, go: asyncio.Event, *rest: bytes) -> AsyncIterator[bytes]:
        yield chunk
        reached.set()
        await go.wait()
        for more in rest:
            yield more

    first = asyncio.create_task(
        store.write(sha256=digest, size_bytes=6, offset=0, chunks=halting(b"XXXXXX", written, gate))
    )
    await written.wait()
    second = asyncio.create_task(
        store.write(sha256=digest, size_bytes=6, offset=6, chunks=halting(b"", newer_written, newer_gate))
    )
    await newer_written.wait()
    gate.set()
    # It neither commits nor deletes what is the newer one's to commit.
    with pytest.raises(Refusal, match="OFFSET_MISMATCH"):
        await first
    newer_gate.set()
    with pytest.raises(Refusal, match="CHECKSUM_MISMATCH"):
        await second


async def test_a_cancelled_write_closes_its_file_only_behind_the_thread_that_writes(tmp_path: Path) -> None:
    entered, gate = threading.Event(), threading.Event()
    order: list[str] = []

    def work() -> None:
        entered.set()
        gate.wait(60)
        order.append("thread")

    async def caller() -> None:
        try:
            await finish_in_thread(work)
        finally:
            order.append("caller")

    task = asyncio.create_task(caller())
    await asyncio.to_thread(entered.wait, 60)
    task.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert order == ["thread", "caller"]


def checkpoint(directory: Path, path: str = "adapter.safetensors", content: bytes = b"weights") -> str:
    directory.mkdir(parents=True)
    digest = hashlib.sha256(content).hexdigest()
    if ".." not in path:
        (directory / path).write_bytes(content)
    files = [{"path": path, "sha256": digest, "size_bytes": len(content)}]
    (directory / "manifest.json").write_text(json.dumps({"name": directory.name, "step": 2, "files": files}))
    return digest


def resume(name: str = "step-00000002", files: list[FileReference] | None = None) -> ResumeRequest:
    return ResumeRequest(checkpoint=name, step=2, attempt=1, files=files or [])


def test_files_of_runs_are_found_by_content_but_not_while_staged(tmp_path: Path) -> None:
    digest = checkpoint(tmp_path / "checkpoints" / "step-00000002")
    staged = checkpoint(tmp_path / "checkpoints" / ".staging-step-00000004", content=b"half")
    manifest = tmp_path / "checkpoints" / "step-00000002" / "manifest.json"
    assert find_file([tmp_path], digest) == manifest.with_name("adapter.safetensors")
    assert find_file([tmp_path], hashlib.sha256(manifest.read_bytes()).hexdigest()) == manifest
    assert find_file([tmp_path], staged) is None
    climbing = tmp_path / "other"
    outside = checkpoint(climbing / "checkpoints" / "step-00000002", path="../../../outside")
    (tmp_path / "outside").write_bytes(b"weights")
    assert find_file([climbing], outside) is None


def test_a_checkpoint_is_linked_and_outlives_its_attempt(tmp_path: Path) -> None:
    job = tmp_path / "runs" / "job"
    checkpoint(job / "1" / "checkpoints" / "step-00000002")
    store = BlobStore(tmp_path / "blobs")
    made = prepare_resume(resume(), job_directory=job, target=job / "2" / "resume", blob_path=store.path)
    assert (made["checkpoint"], made["step"]) == ("step-00000002", 2)
    assert remove_tree(job / "1") == 0
    assert (Path(made["checkpoint_directory"]) / "adapter.safetensors").read_bytes() == b"weights"
    assert (Path(made["checkpoint_directory"]) / "manifest.json").exists()
    assert remove_tree(job / "2") > 0


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (resume("step-00000009"), "CHECKPOINT_NOT_FOUND"),
        (resume("../1"), "INVALID_FIELD"),
        (resume(files=[FileReference(path="a", sha256="0" * 64, size_bytes=1)]), "RESUME_MISMATCH"),
        (resume(files=[FileReference(path="manifest.json", sha256="0" * 64, size_bytes=1)]), "BLOB_NOT_FOUND"),
    ],
)
def test_a_checkpoint_that_cannot_be_had_is_refused(tmp_path: Path, request_: ResumeRequest, reason: str) -> None:
    store = BlobStore(tmp_path / "blobs")
    with pytest.raises(Refusal, match=reason):
        prepare_resume(request_, job_directory=tmp_path, target=tmp_path / "resume", blob_path=store.path)


async def test_a_signal_between_looking_and_waiting_is_not_missed() -> None:
    signal = Signal()
    before = signal.current()
    signal.fire()
    await wait_for(before, 60)
    assert not signal.current().is_set()
    await wait_for(signal.current(), 0.001)
