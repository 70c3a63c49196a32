"""The offline checker finds each violation that is planted in a hand-made trial, and nothing in the trial itself."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.fault_evidence import CANCELLED, NODE, RUNNING, SUCCEEDED, Entry, HandMadeTrial
from tests.faults import checker
from tests.faults.checker import check
from tunesmith.common.v1 import errors_pb2, event_pb2

Trial = HandMadeTrial


@dataclass(frozen=True)
class Planted:
    """A violation: what is done to the trial, the promise that it breaks, and a part of what is said of it."""

    change: Callable[[Trial], object]
    promise: str
    said: str


def _run_entry(trial: Trial, job: str, number: int, attempt: int = 1) -> Entry:
    return next(e for e in trial.logs[job] if (e.attempt, e.run_sequence) == (attempt, number))


def _position(trial: Trial, job: str, entry: Entry) -> int:
    return next(index for index, other in enumerate(trial.logs[job]) if other is entry)


def _operation(trial: Trial, method: str, job: str) -> dict[str, object]:
    return next(
        operation
        for operation in trial.operations
        if operation["method"] == method and operation["response"]["job"]["jobId"] == job
    )


def _drop_job(trial: Trial) -> None:
    for kept in (trial.jobs, trial.logs, trial.highest_attempts):
        kept.pop(RUNNING)
    trial.checkpoints = [row for row in trial.checkpoints if row["job_id"] != RUNNING]
    trial.journals = {key: journal for key, journal in trial.journals.items() if key[0] != RUNNING}


def _duplicate_job(trial: Trial) -> None:
    trial.jobs["01JTWICE"] = trial.jobs[RUNNING] | {"job_id": "01JTWICE", "state": "QUEUED", "attempt": 0}
    trial.logs["01JTWICE"] = [trial.logs[RUNNING][0]]


def _answer_otherwise(trial: Trial) -> None:
    trial.tell("StartTraining", CANCELLED, 1, started=3.0, request_id=f"start-{RUNNING}")


def _accept_another_body(trial: Trial) -> None:
    again = trial.tell("StartTraining", RUNNING, 1, started=3.0, request_id=f"start-{RUNNING}")
    again["request"] |= {"priority": 5}


def _refuse_wrongly(trial: Trial) -> None:
    again = trial.tell("StartTraining", RUNNING, 1, started=3.0, request_id=f"start-{RUNNING}", outcome="NOT_FOUND")
    again["request"] |= {"priority": 5}


def _late_event_of_attempt_1(trial: Trial) -> None:
    entry = _run_entry(trial, SUCCEEDED, 5)
    trial.logs[SUCCEEDED].remove(entry)
    trial.logs[SUCCEEDED].insert(len(trial.logs[SUCCEEDED]) - 2, entry)


def _event_while_queued(trial: Trial) -> None:
    entry = _run_entry(trial, SUCCEEDED, 7)
    position = _position(trial, SUCCEEDED, entry)
    trial.logs[SUCCEEDED].insert(position + 1, trial.logs[SUCCEEDED].pop(position))


def _swap_payload(trial: Trial) -> None:
    _run_entry(trial, RUNNING, 3).payload.step.loss = 9.0


def _drop_run_event(trial: Trial) -> None:
    trial.logs[RUNNING].remove(_run_entry(trial, RUNNING, 4))


def _cut_journal(trial: Trial) -> None:
    trial.journals[RUNNING, 1] = trial.journals[RUNNING, 1][:3]


def _flip_journal(trial: Trial) -> None:
    path = trial.node / "runs" / RUNNING / "1" / "journal"

    def flip() -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    trial.afterwards.append(flip)


def _other_resume(trial: Trial) -> None:
    entry = _run_entry(trial, SUCCEEDED, 3, attempt=2)
    entry.payload.resumed.CopyFrom(event_pb2.ResumedEvent(from_step=1, checkpoint="step-00000001"))


def _begin_anew(trial: Trial) -> None:
    log = trial.logs[SUCCEEDED]
    log.remove(_run_entry(trial, SUCCEEDED, 3, attempt=2))
    _run_entry(trial, SUCCEEDED, 4, attempt=2).payload.step.step = 1


def _lose_node(trial: Trial, *, stopped_seconds: float, service: str = NODE, is_told: bool = True) -> None:
    """The server that is killed at 35 s was stopped until shortly before, and another attempt is seen afterwards."""
    trial.scenario["node_lease_seconds"] = 18.0
    trial.faults[:0] = [
        {"at": 34.0 - stopped_seconds, "kind": "stop", "target": "gpu", "service": service, "pid": 9},
        {"at": 34.0, "kind": "continue", "target": "", "service": "", "pid": 9},
    ]
    if is_told:
        trial.add(RUNNING, 1, event_pb2.NodeReachabilityEvent(node=NODE, reachable=False))
    trial.processes[1].update(attempt=2, engine_pid=555)


def _other_outcome(trial: Trial) -> None:
    failure = errors_pb2.Failure(reason=errors_pb2.ERROR_REASON_TRAINING, fault=errors_pb2.FAULT_PLATFORM)
    trial.jobs[SUCCEEDED] |= {"state": "FAILED", "failure": {"reason": "TRAINING"}}
    last = trial.logs[SUCCEEDED][-1].payload.job_state
    last.state = event_pb2.JOB_STATE_FAILED
    last.failure.CopyFrom(failure)


def _run_again_after_success(trial: Trial) -> None:
    trial.logs[SUCCEEDED].pop()
    trial.state(SUCCEEDED, 2, "RUNNING", "QUEUED")
    trial.state(SUCCEEDED, 3, "QUEUED", "DISPATCHING")
    trial.highest_attempts[SUCCEEDED] = 3


def _go_on_after_the_end(trial: Trial) -> None:
    trial.add(SUCCEEDED, 2, event_pb2.LogEvent(message="late"))


def _skip_a_state(trial: Trial) -> None:
    trial.logs[CANCELLED].remove(
        next(e for e in trial.logs[CANCELLED] if e.payload.job_state.state == event_pb2.JOB_STATE_CANCELLING)
    )


def _illegal_transition(trial: Trial) -> None:
    trial.state(CANCELLED, 1, "CANCELLED", "QUEUED")


def _cancel_without_memory(trial: Trial) -> None:
    del trial.journals[CANCELLED, 1][-2]


def _cancel_without_end(trial: Trial) -> None:
    last_of_run = max(e.run_sequence for e in trial.logs[CANCELLED])
    trial.logs[CANCELLED].remove(_run_entry(trial, CANCELLED, last_of_run))


def _seen_after_cancel(trial: Trial) -> None:
    trial.processes.append(trial.processes[0] | {"at": 30.0, "job_id": CANCELLED})


def _two_outcomes(trial: Trial) -> None:
    trial.journals[CANCELLED, 1].append(trial.journals[CANCELLED, 1][-1])


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _damage_checkpoint(trial: Trial) -> None:
    path = trial.node / "runs" / RUNNING / "1" / "checkpoints" / "step-00000004" / "weights.safetensors"
    trial.afterwards.append(lambda: _damage(path))


def _truncate_checkpoint(trial: Trial) -> None:
    path = trial.node / "runs" / RUNNING / "1" / "checkpoints" / "step-00000002" / "weights.safetensors"
    trial.afterwards.append(lambda: path.write_bytes(b""))


def _remove_newest_checkpoint(trial: Trial) -> None:
    row = next(row for row in trial.checkpoints if row["name"] == "step-00000004")
    row["status"] = "COMMITTED"
    directory = trial.node / "runs" / RUNNING / "1" / "checkpoints" / "step-00000004"
    trial.afterwards.append(lambda: directory.rename(directory.with_name(".deleting-step-00000004")))


def _lose_replica(trial: Trial) -> None:
    row = next(row for row in trial.checkpoints if row["status"] == "REPLICATED")
    trial.afterwards.append(trial.blob(row["files"][0]["sha256"]).unlink)


def _damage_output(trial: Trial) -> None:
    path = trial.output / f"out/{SUCCEEDED}/adapter/adapter_config.json"
    trial.afterwards.append(lambda: path.write_bytes(b"[]"))


def _double_dispatch(trial: Trial) -> None:
    again = next(e for e in trial.logs[RUNNING] if e.payload.job_state.state == event_pb2.JOB_STATE_DISPATCHING)
    trial.logs[RUNNING].insert(_position(trial, RUNNING, again) + 1, Entry(1, 0, again.payload))


def _damage_database(trial: Trial) -> None:
    path = trial.control / "control.sqlite"

    def scribble() -> None:
        data = bytearray(path.read_bytes())
        # Leaves of tables and indices, not what the checker must read to begin at all.
        needle = data.rfind(b"step-00000002")
        data[needle : needle + 4] = b"torn"
        path.write_bytes(data)

    trial.afterwards.append(scribble)


PLANTED = {
    "an acknowledged job is gone": Planted(_drop_job, "R1", "was acknowledged and is gone"),
    "an acknowledged job has vanished": Planted(_drop_job, "R4", "has vanished"),
    "a job is there twice": Planted(_duplicate_job, "R1", "nobody asked for jobs"),
    "an acknowledged field differs": Planted(
        lambda trial: trial.jobs[RUNNING].update(output_path="elsewhere"), "R1", "with output_path"
    ),
    "the request's record is gone": Planted(lambda trial: trial.requests.pop(0), "R1", "the store does not know"),
    "the database is damaged": Planted(_damage_database, "R1", "the database is damaged"),
    "a request id has two answers": Planted(_answer_otherwise, "R2", "was answered in 2 ways"),
    "a request id took two bodies": Planted(_accept_another_body, "R2", "two bodies were both accepted"),
    "a reused request id is refused wrongly": Planted(_refuse_wrongly, "R2", "was answered with NOT_FOUND"),
    "an older attempt publishes": Planted(_late_event_of_attempt_1, "R3", "comes after attempt 2 began"),
    "a run publishes while the job waits": Planted(_event_while_queued, "R3", "while no attempt was on a node"),
    "an attempt is dispatched twice": Planted(_double_dispatch, "R3", "were dispatched, the job counts"),
    "a checkpoint is of another attempt": Planted(
        lambda trial: trial.checkpoints[0].update(attempt=2), "R3", "no event of attempt 2 tells of checkpoint"
    ),
    "an artifact is not the attempt's": Planted(
        lambda trial: trial.artifacts[0].update(files=[]), "R3", "is not what attempt 2 wrote"
    ),
    "a node has an epoch that was never given": Planted(
        lambda trial: trial.highest_attempts.update({RUNNING: 7}), "R3", "which control never dispatched"
    ),
    "a node forgot its highest epoch": Planted(
        lambda trial: trial.highest_attempts.pop(RUNNING), "R3", "its highest epoch is 0"
    ),
    "a job is retried too often": Planted(
        lambda trial: trial.jobs[SUCCEEDED].update(max_retries=0), "R4", "0 are allowed"
    ),
    "a job's retries are miscounted": Planted(
        lambda trial: trial.jobs[SUCCEEDED].update(num_retries=2), "R4", "its log tells 1"
    ),
    "a job never ends": Planted(lambda trial: trial.scenario.update(all_over=True), "R4", "is still RUNNING"),
    "an attempt goes on from an older checkpoint": Planted(_other_resume, "R4", "newest to be had was step-00000002"),
    "an attempt begins anew": Planted(_begin_anew, "R4", "began anew in spite of"),
    "the log has what no journal has": Planted(_cut_journal, "R5", "the journal ends at 3"),
    "a journal is damaged": Planted(_flip_journal, "R5", "the journal ends at"),
    "an adopted engine is another one": Planted(
        lambda trial: trial.processes[1].update(engine_pid=555), "R6", "engine_pid was 101"
    ),
    "an adopted run is another attempt": Planted(
        lambda trial: trial.processes[1].update(attempt=2), "R6", "attempt was 1"
    ),
    "a job is given away after a short stop": Planted(
        lambda trial: _lose_node(trial, stopped_seconds=17.0), "R6", "attempt was 1"
    ),
    "a job is given away while another node was stopped": Planted(
        lambda trial: _lose_node(trial, stopped_seconds=19.0, service="other"), "R6", "attempt was 1"
    ),
    "a job is given away though its node was not lost": Planted(
        lambda trial: _lose_node(trial, stopped_seconds=19.0, is_told=False), "R6", "attempt was 1"
    ),
    "the outcome is not the recorded one": Planted(_other_outcome, "R7", "recorded SUCCEEDED, the job is FAILED"),
    "a run that succeeded is run again": Planted(_run_again_after_success, "R7", "attempt 3 was dispatched"),
    "the log goes on after the end": Planted(_go_on_after_the_end, "R7", "the log goes on after SUCCEEDED"),
    "a state is skipped": Planted(_skip_a_state, "R7", "goes on from CANCELLING, not RUNNING"),
    "a transition is not in the table": Planted(_illegal_transition, "R7", "moves it from CANCELLED to QUEUED"),
    "the record is not what the log says": Planted(
        lambda trial: trial.jobs[RUNNING].update(state="PAUSED"), "R7", "is PAUSED; its log says RUNNING"
    ),
    "an answer is of no moment": Planted(
        lambda trial: _operation(trial, "GetJob", RUNNING)["response"]["job"].update(state="JOB_STATE_FAILED"),  # type: ignore[index]
        "R7",
        "was told as FAILED",
    ),
    "an answer goes backwards": Planted(lambda trial: trial.tell("GetJob", RUNNING, 3, started=40.0), "R7", "had told"),
    "a journal has two outcomes": Planted(_two_outcomes, "R7", "goes on with run_state after CANCELLED"),
    "an event is missing": Planted(lambda trial: setattr(trial.logs[RUNNING][-1], "sequence", 99), "R8", "is missing"),
    "a run event is missing": Planted(_drop_run_event, "R8", "run sequences are not contiguous: 4 is missing"),
    "an event is another than the journal's": Planted(_swap_payload, "R8", "is not the journal's 1/3"),
    "the cursor is wrong": Planted(lambda trial: trial.jobs[RUNNING].update(run_cursor=2), "R8", "the cursor is 2"),
    "a consumer lost an event": Planted(lambda trial: trial.watches["consumer-1"].pop(4), "R9", "came as"),
    "a consumer got an event twice": Planted(
        lambda trial: trial.watches["consumer-1"].insert(2, trial.watches["consumer-1"][2]), "R9", "came as"
    ),
    "a consumer got another event": Planted(
        lambda trial: trial.watches["consumer-1"][3].update(payload_sha256="0" * 64), "R9", "are not those of the log"
    ),
    "a consumer was left before the end": Planted(
        lambda trial: trial.watches["consumer-1"].pop(), "R9", "was given job"
    ),
    "a cancel without memory": Planted(_cancel_without_memory, "R14", "CANCELLED without MEMORY_RELEASED"),
    "a cancel before the run ended": Planted(_cancel_without_end, "R14", "does not tell that its run ended"),
    "a process outlives a cancel": Planted(_seen_after_cancel, "R14", "after CANCELLED was told"),
    "a checkpoint's byte is flipped": Planted(_damage_checkpoint, "R19", "has SHA-256"),
    "a checkpoint's file is cut": Planted(_truncate_checkpoint, "R19", "has 0 bytes"),
    "the newest checkpoint is gone": Planted(_remove_newest_checkpoint, "R19", "is not on its node"),
    "a replica is gone": Planted(_lose_replica, "R19", "No such file"),
    "an artifact is damaged": Planted(_damage_output, "R19", "in the output"),
    "a job has no artifact": Planted(lambda trial: trial.artifacts.clear(), "R19", "SUCCEEDED and has no artifact"),
    "a twin started": Planted(lambda trial: trial.faults[1].update(status=0), "R31", "did not refuse to start"),
    "a twin harmed the first": Planted(lambda trial: trial.faults[1].update(first_alive=False), "R31", "harmed"),
}


def test_a_trial_in_which_all_held_has_no_violation(tmp_path: Path) -> None:
    findings = check(HandMadeTrial(tmp_path).write())
    assert [violation for finding in findings for violation in finding.violations] == []
    assert {finding.promise for finding in findings} == {planted.promise for planted in PLANTED.values()}
    assert all(finding.tried == finding.held > 0 for finding in findings)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(tmp_path: Path, name: str) -> None:
    planted = PLANTED[name]
    trial = HandMadeTrial(tmp_path)
    planted.change(trial)
    found = {finding.promise: finding for finding in check(trial.write())}[planted.promise]
    assert found.held < found.tried
    assert any(planted.said in violation for violation in found.violations), found.violations


def test_a_job_whose_node_was_stopped_beyond_its_lease_is_rightly_given_away(tmp_path: Path) -> None:
    trial = HandMadeTrial(tmp_path)
    _lose_node(trial, stopped_seconds=19.0)
    assert [violation for finding in check(trial.write()) for violation in finding.violations] == []


def test_a_call_without_answer_may_have_made_one_job_or_none(tmp_path: Path) -> None:
    trial = HandMadeTrial(tmp_path)
    operation = _operation(trial, "StartTraining", RUNNING)
    operation |= {"outcome": "UNKNOWN", "response": None}
    lost = trial.tell("StartTraining", RUNNING, 1, started=2.0, request_id="lost", outcome="UNKNOWN")
    assert lost["response"] is None
    assert all(finding.held == finding.tried for finding in check(trial.write()))


def test_a_checkpoint_that_retention_deleted_is_not_missed(tmp_path: Path) -> None:
    trial = HandMadeTrial(tmp_path)
    directory = trial.node / "runs" / RUNNING / "1" / "checkpoints" / "step-00000002"
    trial.afterwards.append(lambda: directory.rename(directory.with_name(".deleting-step-00000002")))
    assert all(finding.held == finding.tried for finding in check(trial.write()))


def test_the_command_says_what_it_found(tmp_path: Path) -> None:
    trial = HandMadeTrial(tmp_path)
    trial.jobs[RUNNING]["state"] = "PAUSED"
    command = [sys.executable, "-m", "tests.faults.checker", str(trial.write())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert "is PAUSED; its log says RUNNING" in done.stdout
    assert subprocess.run(command[:3], capture_output=True, timeout=60, check=False).returncode == 2


def test_the_checker_knows_nothing_of_the_product(tmp_path: Path) -> None:
    for path in Path(checker.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("control_service", "gpu_service")], path
    code = (
        "import json, sys; from pathlib import Path; from tests.faults.checker import check;"
        f"check(Path({str(HandMadeTrial(tmp_path).write())!r}));"
        "ours = ('control_service', 'gpu_service', 'sqlalchemy');"
        "print(json.dumps([name for name in sys.modules if name.split('.')[0] in ours]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == []
