"""A hand-made trial in which every promise held, as data that a test changes before it is written to be checked.

Three jobs: one whose engine was killed and that went on from a checkpoint and succeeded, one that was cancelled while
it trained, one that trains on. The files are written with the product's own schema and journal writer.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from google.protobuf.json_format import MessageToDict

from control_service.adapters.sql import schema
from control_service.adapters.sql.engine import make_engine
from gpu_service.journal import Writer, events
from tunesmith.common.v1 import errors_pb2, event_pb2, file_pb2
from tunesmith.control.v1 import job_service_pb2

SUCCEEDED, CANCELLED, RUNNING = "01JSUCCEEDED", "01JCANCELLED", "01JRUNNING"
NODE = "gpu"
INSTALLATION = "f" * 32
_CREATE_TIME_MICROSECONDS = 1_900_000_000_000_000


@dataclass
class Entry:
    """An event of a job's log; one of a run stands in the attempt's journal too, unless a test takes it out."""

    attempt: int
    run_sequence: int
    payload: event_pb2.EventPayload
    sequence: int = 0


class HandMadeTrial:
    """Everything below `root`; `write` makes the files and gives the evidence directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.control = root / "control"
        self.node = root / "node"
        self.output = root / "output"
        self.scenario: dict[str, Any] = {
            "seed": 1,
            "control_directory": str(self.control),
            "output_root": str(self.output),
            "node_directories": {NODE: str(self.node)},
        }
        self.operations: list[dict[str, Any]] = []
        self.faults: list[dict[str, Any]] = []
        self.processes: list[dict[str, Any]] = []
        self.watches: dict[str, list[dict[str, Any]]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.requests: list[dict[str, Any]] = []
        self.checkpoints: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.logs: dict[str, list[Entry]] = {}
        self.journals: dict[tuple[str, int], list[event_pb2.EventPayload]] = {}
        self.highest_attempts: dict[str, int] = {}
        # What is done to the files once they are written.
        self.afterwards: list[Any] = []
        self._job_that_succeeded()
        self._job_that_was_cancelled()
        self._job_that_runs()
        self._observe()

    # The three jobs.

    def _job_that_succeeded(self) -> None:
        job = SUCCEEDED
        self._begin(job)
        self._dispatch(job, 1)
        self._run(job, 1, *_opening(), *(_step(number) for number in (1, 2)))
        self._checkpoint(job, 1, 2, status="COMMITTED")
        self._run(job, 1, _step(3), _run_state("FAILED", _failure()))
        self.state(job, 1, "RUNNING", "QUEUED", failure=_failure())
        self._dispatch(job, 2)
        self._run(job, 2, *_opening(), event_pb2.ResumedEvent(from_step=2, checkpoint="step-00000002"))
        self._run(job, 2, *(_step(number) for number in (3, 4)), event_pb2.RealizedEvent(num_steps=4))
        files = self.place({"adapter_model.safetensors": b"adapter", "adapter_config.json": b"{}"})
        artifact = event_pb2.ArtifactEvent(name="adapter", kind=event_pb2.ARTIFACT_KIND_ADAPTER, files=files)
        self._run(job, 2, artifact, event_pb2.MemoryReleasedEvent(freed_bytes=1), _run_state("SUCCEEDED"))
        self.add(job, 2, event_pb2.PhaseEvent(phase=event_pb2.PHASE_COLLECTING))
        collected = event_pb2.ArtifactEvent()
        collected.CopyFrom(artifact)
        collected.collected = True
        self.add(job, 2, collected)
        self.state(job, 2, "RUNNING", "SUCCEEDED")
        self.jobs[job] |= {"num_retries": 1, "run_state": "SUCCEEDED"}
        self.artifacts.append(
            {
                "job_id": job,
                "name": "adapter",
                "kind": "ADAPTER",
                "files": _as_json(files),
                "path": f"out/{job}/adapter",
                "create_time": None,
            }
        )

    def _job_that_was_cancelled(self) -> None:
        job = CANCELLED
        self._begin(job)
        self._dispatch(job, 1)
        self._run(job, 1, *_opening(), _step(1))
        self.state(job, 1, "RUNNING", "CANCELLING")
        self._run(job, 1, _run_state("STOPPING"), event_pb2.MemoryReleasedEvent(freed_bytes=1), _run_state("CANCELLED"))
        self.state(job, 1, "CANCELLING", "CANCELLED")
        self.jobs[job]["run_state"] = "CANCELLED"
        self.tell("CancelJob", job, self.length(job) - 3, started=20.0, request_id="cancel")
        self.requests.append(_request("CancelJob", "cancel", job))
        self.tell("GetJob", job, self.length(job), started=22.0)

    def _job_that_runs(self) -> None:
        job = RUNNING
        self._begin(job)
        self._dispatch(job, 1)
        self._run(job, 1, *_opening(), *(_step(number) for number in (1, 2)))
        self._checkpoint(job, 1, 2, status="COMMITTED")
        self._run(job, 1, *(_step(number) for number in (3, 4)))
        self._checkpoint(job, 1, 4, status="REPLICATED")
        self.jobs[job]["run_state"] = "RUNNING"
        self.tell("GetJob", job, 3, started=30.0)
        self.tell("GetJob", job, self.length(job), started=31.0)

    def _observe(self) -> None:
        self.faults.append({"at": 35.0, "kind": "kill", "target": "gpu", "pid": 9})
        self.faults.append({"at": 36.0, "kind": "twin", "target": "control", "status": 3, "first_alive": True})
        for at in (33.0, 37.0):
            self.processes.append(
                {
                    "at": at,
                    "node": NODE,
                    "shim_pid": 100,
                    "engine_pid": 101,
                    "start_time": 5,
                    "job_id": RUNNING,
                    "attempt": 1,
                }
            )
        self.watches["consumer-1"] = [
            {
                "job_id": SUCCEEDED,
                "sequence": index,
                "attempt": entry.attempt,
                "run_sequence": entry.run_sequence,
                "payload_sha256": hashlib.sha256(entry.payload.SerializeToString()).hexdigest(),
            }
            for index, entry in enumerate(self.logs[SUCCEEDED], start=1)
            if index > 3
        ]

    # Parts of a job.

    def _begin(self, job: str) -> None:
        self.logs[job] = []
        self.jobs[job] = {
            "job_id": job,
            "project_id": 1,
            "project_name": "p",
            "spec": {},
            "spec_digest": "a" * 64,
            "output_path": f"out/{job}",
            "priority": 0,
            "max_retries": 2,
            "num_retries": 0,
            "retry_of_job_id": "",
            "phase": "UNSPECIFIED",
            "node": NODE,
            "node_unreachable": False,
            "progress": {},
            "failure": None,
            "weights_digest": "",
            "revision": 1,
            "run_state": None,
        }
        self.state(job, 0, "UNSPECIFIED", "QUEUED")
        self.tell("StartTraining", job, 1, started=1.0, request_id=f"start-{job}")
        self.requests.append(_request("StartTraining", f"start-{job}", job))

    def _dispatch(self, job: str, attempt: int) -> None:
        self.state(job, attempt, "QUEUED", "DISPATCHING")
        self.state(job, attempt, "DISPATCHING", "RUNNING")
        self.highest_attempts[job] = attempt
        self.journals[job, attempt] = []

    def state(self, job: str, attempt: int, previous: str, state: str, failure: Any = None) -> None:
        """Control moves the job."""
        told = event_pb2.JobStateEvent(
            previous_state=event_pb2.JobState.Value(f"JOB_STATE_{previous}"),
            state=event_pb2.JobState.Value(f"JOB_STATE_{state}"),
            node=NODE if attempt else "",
            failure=failure,
        )
        self.add(job, attempt, told)
        self.jobs[job] |= {"state": state, "attempt": attempt}

    def add(self, job: str, attempt: int, message: events.EventMessage, run_sequence: int = 0) -> Entry:
        """An event at the log's end, of control's own unless it has a run sequence."""
        entry = Entry(attempt, run_sequence, events.wrap(message))
        self.logs[job].append(entry)
        return entry

    def _run(self, job: str, attempt: int, *messages: events.EventMessage) -> None:
        journal = self.journals[job, attempt]
        for message in messages:
            journal.append(events.wrap(message))
            self.add(job, attempt, message, run_sequence=len(journal))

    def _checkpoint(self, job: str, attempt: int, step: int, *, status: str) -> None:
        name = f"step-{step:08d}"
        content = f"{job} {step}".encode()
        directory = self.node / "runs" / job / str(attempt) / "checkpoints" / name
        directory.mkdir(parents=True)
        (directory / "weights.safetensors").write_bytes(content)
        files = self.place({"weights.safetensors": content})
        manifest = json.dumps({"step": step, "files": _as_json(files)}).encode()
        (directory / "manifest.json").write_bytes(manifest)
        everything = [*files, *self.place({"manifest.json": manifest})]
        told = event_pb2.CheckpointEvent(
            name=name,
            step=step,
            status=event_pb2.CHECKPOINT_STATUS_COMMITTED,
            manifest_sha256=hashlib.sha256(manifest).hexdigest(),
            files=everything,
        )
        self._run(job, attempt, told)
        if status == "REPLICATED":
            copied = event_pb2.CheckpointEvent()
            copied.CopyFrom(told)
            copied.status = event_pb2.CHECKPOINT_STATUS_REPLICATED
            self.add(job, attempt, copied)
        self.checkpoints.append(
            {
                "job_id": job,
                "name": name,
                "attempt": attempt,
                "step": step,
                "status": status,
                "size_bytes": len(content),
                "manifest_sha256": told.manifest_sha256,
                "files": _as_json(everything),
                "node": NODE,
                "create_time": None,
                "best": False,
            }
        )

    def place(self, files: dict[str, bytes]) -> list[file_pb2.FileReference]:
        """Puts the files into control's store and below the output root of the job that succeeded."""
        found = []
        for path, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            for target in (self.blob(digest), self.output / f"out/{SUCCEEDED}/adapter" / path):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
            found.append(file_pb2.FileReference(path=path, sha256=digest, size_bytes=len(content)))
        return found

    def blob(self, sha256: str) -> Path:
        """Where a content lies in control's store."""
        return self.control / "blobs" / sha256[:2] / sha256

    # What a client was told.

    def length(self, job: str) -> int:
        """Events of the log so far."""
        return len(self.logs[job])

    def tell(
        self, method: str, job: str, sequence: int, *, started: float, request_id: str = "", outcome: str = "OK"
    ) -> dict[str, Any]:
        """A call that was answered with the job as it was at that event."""
        told = self._job_at(job, sequence)
        request = {"project_id": 1, "request_id": request_id} if method == "StartTraining" else {"job_id": job}
        operation = {
            "client": "client-1",
            "number": len(self.operations),
            "method": method,
            "request_id": request_id,
            "request": request,
            "started": started,
            "ended": started + 0.5,
            "outcome": outcome,
            "reason": "",
            "response": {"job": MessageToDict(told)} if outcome == "OK" else None,
        }
        self.operations.append(operation)
        return operation

    def _job_at(self, job: str, sequence: int) -> job_service_pb2.Job:
        facts = self.jobs[job]
        told = job_service_pb2.Job(
            **{name: facts[name] for name in ("job_id", "project_id", "project_name", "spec_digest", "output_path")},
            last_sequence=sequence,
        )
        told.create_time.FromMicroseconds(_CREATE_TIME_MICROSECONDS)
        for entry in self.logs[job][:sequence]:
            told.attempt = entry.attempt
            if entry.payload.HasField("job_state"):
                told.state = entry.payload.job_state.state
        return told

    # Writing.

    def write(self) -> Path:
        """Gives the evidence directory."""
        evidence = self.root / "evidence"
        (evidence / "watches").mkdir(parents=True)
        (evidence / "scenario.json").write_text(json.dumps(self.scenario))
        lists = {"operations": self.operations, "faults": self.faults, "processes": self.processes}
        lists |= {f"watches/{consumer}": lines for consumer, lines in self.watches.items()}
        for name, lines in lists.items():
            (evidence / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._write_node()
        self._write_database()
        for change in self.afterwards:
            change()
        return evidence

    def _write_node(self) -> None:
        for (job, attempt), payloads in self.journals.items():
            directory = self.node / "runs" / job / str(attempt)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "run.json").write_text(json.dumps({"job_id": job, "attempt": attempt}))
            with Writer.open(directory / "journal", attempt) as writer:
                for payload in payloads:
                    writer.append(payload)
        facts = {"name": NODE, "installation_id": INSTALLATION, "highest_attempts": self.highest_attempts}
        (self.node / "node.json").write_text(json.dumps(facts))

    def _write_database(self) -> None:
        self.control.mkdir(exist_ok=True)
        engine = make_engine(self.control / "control.sqlite")
        schema.metadata.create_all(engine)
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            _insert(connection, schema.meta, {"key": "installation_id", "value": INSTALLATION})
            for job_id, row in self.jobs.items():
                log = self.logs[job_id]
                derived = {
                    "last_sequence": len(log),
                    "run_cursor": max((e.run_sequence for e in log if e.attempt == row["attempt"]), default=0),
                    "create_time": _CREATE_TIME_MICROSECONDS,
                }
                _insert(connection, schema.jobs, {**derived, **row})
                for number, entry in enumerate(log, start=1):
                    kind = events.kind_of(entry.payload)
                    event = {"sequence": entry.sequence or number, "attempt": entry.attempt, "kind": kind, "time": 0}
                    payload = {"payload": entry.payload.SerializeToString(), "run_sequence": entry.run_sequence or None}
                    _insert(connection, schema.events, {"job_id": job_id, **event, **payload})
            for table, rows in (
                (schema.requests, self.requests),
                (schema.checkpoints, self.checkpoints),
                (schema.artifacts, self.artifacts),
            ):
                for row in rows:
                    _insert(connection, table, row | {"create_time": _CREATE_TIME_MICROSECONDS})
            connection.exec_driver_sql("COMMIT")
        engine.dispose()


def _insert(connection: sa.Connection, table: sa.Table, row: dict[str, Any]) -> None:
    values = {key: json.dumps(value) if isinstance(value, (dict, list)) else value for key, value in row.items()}
    names = ", ".join(values)
    marks = ", ".join("?" for _ in values)
    connection.exec_driver_sql(f"INSERT INTO {table.name} ({names}) VALUES ({marks})", tuple(values.values()))


def _request(method: str, request_id: str, reference: str) -> dict[str, Any]:
    return {"method": method, "request_id": request_id, "body_digest": "", "reference": reference}


def _as_json(files: list[file_pb2.FileReference]) -> list[dict[str, Any]]:
    return [{"path": file.path, "sha256": file.sha256, "size_bytes": file.size_bytes} for file in files]


def _opening() -> list[events.EventMessage]:
    return [_run_state("RUNNING"), event_pb2.PhaseEvent(phase=event_pb2.PHASE_TRAINING)]


def _step(number: int) -> event_pb2.StepEvent:
    return event_pb2.StepEvent(step=number, total_steps=4)


def _run_state(state: str, failure: errors_pb2.Failure | None = None) -> event_pb2.RunStateEvent:
    return event_pb2.RunStateEvent(state=event_pb2.RunState.Value(f"RUN_STATE_{state}"), failure=failure)


def _failure() -> errors_pb2.Failure:
    return errors_pb2.Failure(reason=errors_pb2.ERROR_REASON_ENGINE_KILLED, fault=errors_pb2.FAULT_PLATFORM)
