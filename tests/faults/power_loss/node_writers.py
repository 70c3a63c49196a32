"""What a node writes of its runs, as writers whose every moment the power may go: runs, facts, journals, checkpoints,
artifacts. Recovery is the product's own; what a node stores for runs to come is in `store_writers`."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from gpu_service.engine import durable
from gpu_service.engine.training import retention
from gpu_service.journal import Reader, events, summarize
from gpu_service.journal import Writer as JournalWriter
from gpu_service.runs.blobs import BlobStore
from gpu_service.runs.manifests import FileReference
from gpu_service.runs.node_files import NodeFiles, RunKey
from gpu_service.runs.run_files import ResumeRequest, prepare_resume, remove_tree
from gpu_service.shim import durable_json
from gpu_service.shim.configuration import EngineConfiguration
from gpu_service.shim.records import ExitRecord, ShimRecord
from tests.faults.power_loss.harness import Acknowledged, Writer, highest_number
from tests.faults.power_loss.store_writers import chunks
from tunesmith.common.v1 import event_pb2

JOB = "01JOB"
INSTALLATION = "f" * 32
_ENDED_JOURNAL = "ended-journal"


# Small JSON files that are replaced whole.


def _write_json(root: Path, acknowledge: Acknowledged) -> None:
    for number in range(1, 4):
        durable_json.write(root / "node.json", {"number": number, "filler": "x" * 50 * number})
        acknowledge(f"written:{number}")


def _json_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    content = durable_json.read(root / "node.json") or {"number": 0}
    if content["number"] < highest_number(acknowledged, "written"):
        yield f"the file has write {content['number']}"


# An engine's directory: what a burial reads.


def _write_engine(root: Path, acknowledge: Acknowledged) -> None:
    directory = root / "engines" / "one"
    # The first by the server's start.
    durable_json.make_directory(directory.parent)
    durable_json.make_directory(directory)
    EngineConfiguration(
        argv=("python",),
        environment={},
        device={"type": "cpu", "index": -1},
        orphan_limit_seconds=1.0,
        grace_seconds=1.0,
        hang_limit_seconds=1.0,
    ).write(directory)
    for run in (None, "/run", None):
        shim = ShimRecord(
            shim_pid=1, shim_start_time=2, engine_pid=3, engine_start_time=4, run_directory=run, stop_mode=None
        )
        shim.write(directory)
    ExitRecord(status=None, signal=9, phase="", run_directory="/run", stop_mode=None).write(directory)
    acknowledge("ended:1")


def _engine_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    directory = root / "engines" / "one"
    ShimRecord.read(directory)
    ending = ExitRecord.read(directory)
    if ending is not None and ending.signal != 9:
        yield "the exit record is another"
    if acknowledged and ending is None:
        # A process that nobody saw end is buried as lost: said, not silent. Its record must still be there.
        yield "the exit record is gone"


# Runs, and the highest epochs that the node accepted.


def _files(root: Path) -> NodeFiles:
    return NodeFiles(root / "node", root / "models")


def _accept_runs(root: Path, acknowledge: Acknowledged) -> None:
    files = _files(root)
    durable_json.make_directory(files.root)
    files.prepare()
    facts = files.read_facts("gpu")
    known = {int(content["attempt"]) for _, content in files.read_runs()}
    for attempt in (1, 2):
        key = RunKey(installation_id=INSTALLATION, job_id=JOB, attempt=attempt)
        if facts.highest_attempts.get(JOB, 0) > attempt:
            continue
        if attempt not in known:
            resume = _resume(files, attempt) if attempt > 1 else None
            files.write_run(key, {"job_id": JOB, "attempt": attempt, "resume": resume})
        facts = facts.with_attempt(key)
        files.write_facts(facts)
        acknowledge(f"accepted:{attempt}")
        if attempt == 1:
            _train(files.run_directory(key))
    first = RunKey(installation_id=INSTALLATION, job_id=JOB, attempt=1)
    acknowledge("releasing:1")
    if files.run_directory(first).exists():
        remove_tree(files.discard_run(first))


def _train(directory: Path) -> None:
    if not (directory / "checkpoints" / "step-00000002").exists():
        _save(directory, 2)
    # As an engine left it; `journal` below is about how it is written.
    (directory / "journal").write_bytes((directory.parents[3] / _ENDED_JOURNAL).read_bytes())
    durable_json.sync_tree(directory)


def _prepare_journal(root: Path) -> None:
    with JournalWriter.open(root / _ENDED_JOURNAL, 1) as journal:
        journal.append(events.wrap(event_pb2.RunStateEvent(state=event_pb2.RUN_STATE_INTERRUPTED)))


def _resume(files: NodeFiles, attempt: int) -> dict[str, object]:
    return prepare_resume(
        ResumeRequest(checkpoint="step-00000002", step=2, attempt=1, files=()),
        job_directory=files.runs / JOB,
        target=files.runs / JOB / str(attempt) / "resume",
        blob_path=lambda sha256: files.blobs / sha256,
    )


def _run_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    files = _files(root)
    files.root.mkdir(parents=True, exist_ok=True)
    files.prepare()
    runs = {int(content["attempt"]): (directory, content) for directory, content in files.read_runs()}
    facts = files.read_facts("gpu")
    # As the server does when it starts.
    highest = max([facts.highest_attempts.get(JOB, 0), *runs])
    accepted = highest_number(acknowledged, "accepted")
    if highest < accepted:
        yield f"attempt {accepted} was accepted, the highest epoch is {highest}"
    for attempt in range(1, accepted + 1):
        if attempt not in runs and not (attempt == 1 and "releasing:1" in acknowledged):
            yield f"attempt {attempt} was accepted and is gone"
    for attempt, (directory, content) in runs.items():
        over = summarize(directory / "journal").is_over
        if attempt == 1 and "releasing:1" in acknowledged and not over:
            yield "a run that was over and is being released would be begun again"
        if content["resume"] is not None:
            yield from _whole(directory / "resume" / "step-00000002", "what an accepted run goes on from")


def _whole(directory: Path, what: str) -> Iterator[str]:
    try:
        durable.read_manifest(directory)
    except durable.DamagedDirectory as error:
        yield f"{what}: {error}"


# A run's journal.


def _append(root: Path, acknowledge: Acknowledged) -> None:
    with JournalWriter.open(root / "journal", 1) as journal:
        for number in range(1, 7):
            if number % 3:
                journal.append(events.wrap(event_pb2.StepEvent(step=number)))
            else:
                journal.append(events.wrap(event_pb2.PhaseEvent(phase=event_pb2.PHASE_TRAINING)))
                acknowledge(f"durable:{number}")


def _journal_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    needed = highest_number(acknowledged, "durable")
    if not (root / "journal").exists():
        if needed:
            yield f"the journal is gone, {needed} events were durable"
        return
    # Whoever buries the engine goes on with it.
    with JournalWriter.open(root / "journal", 1) as journal:
        if journal.last_sequence < needed:
            yield f"the journal ends at {journal.last_sequence}, {needed} events were durable"
        end = journal.append(events.wrap(event_pb2.RunStateEvent(state=event_pb2.RUN_STATE_FAILED)))
    with Reader(root / "journal") as reader:
        records = reader.read(0)
    if [record.run_sequence for record in records] != list(range(1, end + 1)):
        yield f"the journal cannot be read to its end, {end}"
    for record in records[:-1]:
        payload = event_pb2.EventPayload.FromString(record.decode().payload)
        if payload.HasField("step") and payload.step.step != record.run_sequence:
            yield f"event {record.run_sequence} is another"


# Checkpoints: committed, told of, pruned.


def _save(run: Path, step: int) -> None:
    with durable.staged(run / "checkpoints" / f"step-{step:08d}") as staging:
        (staging / "weights.safetensors").write_bytes(f"weights {step} ".encode() * 20)
        (staging / "trainer.json").write_text(json.dumps({"step": step}))
        durable.write_manifest(staging, {"step": step, "best": False}, durable.list_files(staging))


def _save_and_prune(root: Path, acknowledge: Acknowledged) -> None:
    run = root / "run"
    run.mkdir(exist_ok=True)
    durable_json.write(run / "run.json", {"attempt": 1})
    durable_json.sync_directory(root)
    with JournalWriter.open(run / "journal", 1) as journal:
        for step in (2, 4, 6):
            _save(run, step)
            told = event_pb2.CheckpointEvent(
                name=f"step-{step:08d}", step=step, status=event_pb2.CHECKPOINT_STATUS_COMMITTED
            )
            journal.append(events.wrap(told))
            acknowledge(f"committed:{step}")
            for one in retention.prune(run / "checkpoints", keep=1, keep_best=False):
                gone = event_pb2.CheckpointEvent(name=one.name, status=event_pb2.CHECKPOINT_STATUS_DELETED)
                journal.append(events.wrap(gone))


def _checkpoint_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    run = root / "run"
    told = summarize(run / "journal")
    newest = told.last_checkpoint
    step = newest.step if newest else 0
    if step < highest_number(acknowledged, "committed"):
        yield f"step {highest_number(acknowledged, 'committed')} was committed, the journal tells of step {step}"
    if newest is not None:
        yield from _whole(run / "checkpoints" / newest.name, "the newest checkpoint that was told of")
    for directory in (run / "checkpoints").glob("step-*"):
        yield from _whole(directory, f"what has the name {directory.name}")


# Artifacts, then the outcome.


def _write_artifacts(root: Path, acknowledge: Acknowledged) -> None:
    with durable.staged(root / "artifacts") as staging:
        (staging / "adapter" / "nested").mkdir(parents=True)
        (staging / "adapter" / "adapter_model.safetensors").write_bytes(b"adapter" * 50)
        (staging / "adapter" / "nested" / "config.json").write_text("{}")
        files = [vars(stored) for stored in durable.list_files(staging / "adapter")]
        text = json.dumps({"artifacts": [{"name": "adapter", "kind": "ADAPTER", "files": files}]})
        (staging / durable.MANIFEST_FILE).write_text(text)
    with JournalWriter.open(root / "journal", 1) as journal:
        journal.append(events.wrap(event_pb2.RunStateEvent(state=event_pb2.RUN_STATE_SUCCEEDED)))
    acknowledge("succeeded:1")


def _artifact_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    over = summarize(root / "journal").is_over
    if acknowledged and not over:
        yield "the outcome is gone"
    manifest = durable_json.read(root / "artifacts" / "manifest.json")
    if manifest is None:
        if over:
            yield "the run succeeded and its artifacts are gone"
        return
    for file in manifest["artifacts"][0]["files"]:
        path = root / "artifacts" / "adapter" / file["path"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != file["sha256"]:
            yield f"artifact {file['path']} is not whole"


# A run that goes on from control's copy.


def _from_blobs(root: Path, acknowledge: Acknowledged) -> None:
    """A run that goes on from control's copy of a checkpoint."""
    files = _files(root)
    durable_json.make_directory(files.root)
    files.prepare()
    manifest = json.dumps({"step": 2, "best": False, "files": []}).encode()
    digest = hashlib.sha256(manifest).hexdigest()
    (files.blobs / digest[:2]).mkdir(exist_ok=True)
    write = BlobStore(files.blobs).write(sha256=digest, size_bytes=len(manifest), offset=0, chunks=chunks(manifest))
    asyncio.run(write)
    key = RunKey(installation_id=INSTALLATION, job_id=JOB, attempt=2)
    if not files.read_runs():
        _accept_from_blobs(files, key, digest, len(manifest))
    files.write_facts(files.read_facts("gpu").with_attempt(key))
    acknowledge("accepted:2")


def _accept_from_blobs(files: NodeFiles, key: RunKey, digest: str, size_bytes: int) -> None:
    resume = prepare_resume(
        ResumeRequest(
            checkpoint="step-00000002",
            step=2,
            attempt=1,
            files=[FileReference(path="manifest.json", sha256=digest, size_bytes=size_bytes)],
        ),
        job_directory=files.runs / JOB,
        target=files.runs / JOB / "2" / "resume",
        blob_path=BlobStore(files.blobs).path,
    )
    files.write_run(key, {"job_id": JOB, "attempt": 2, "resume": resume})


def _from_blobs_problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    files = _files(root)
    files.root.mkdir(parents=True, exist_ok=True)
    files.prepare()
    runs = files.read_runs()
    if acknowledged and not runs:
        yield "an accepted run is gone"
    for directory, _ in runs:
        yield from _whole(directory / "resume" / "step-00000002", "what an accepted run goes on from")


NODE_WRITERS: tuple[Writer, ...] = (
    # What a process finds it believes only where it synced the directory: `runs` does that.
    Writer(name="json", promise="R1", act=_write_json, problems=_json_problems, can_be_killed=False),
    Writer(name="engine-records", promise="R7", act=_write_engine, problems=_engine_problems),
    Writer(name="runs", promise="R3", act=_accept_runs, problems=_run_problems, prepare=_prepare_journal),
    Writer(name="run-from-blobs", promise="R4", act=_from_blobs, problems=_from_blobs_problems),
    # A killed writer's lock is let go by its process' death, which no recorder in the process can play.
    Writer(name="journal", promise="R8", act=_append, problems=_journal_problems, can_be_killed=False),
    Writer(name="checkpoints", promise="R19", act=_save_and_prune, problems=_checkpoint_problems, can_be_killed=False),
    Writer(name="artifacts", promise="R7", act=_write_artifacts, problems=_artifact_problems, can_be_killed=False),
)
