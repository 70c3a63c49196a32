"""An engine without torch: speaks the shim's contract and writes journals, checkpoints and artifacts like the real one.

Run as `python -m tests.fakes.stub_engine --control-fd N`. It takes the number of steps and the save interval from the
run's spec, and everything else from a script: the JSON object in the environment variable TUNESMITH_STUB, overridden by
the JSON object in the run's first sample prompt. Keys, all optional:

step_seconds, phase_seconds   time that a step, and each phase before training, takes (0.01, 0)
hold_at, until_file           wait at a phase name or a step number until the file exists; stops are still obeyed
hang                          `{"at": a phase name or a step number, "way": one of `tests.fakes.hanging`}`
ignore_stop                   hear no stop_run and no shutdown; ignore SIGTERM
freeze_at                     SIGSTOP itself on reaching a phase name or a step number
spawn_setsid_child            start a long-lived process in a session of its own, double-forked
spawn_pool                    start so many processes that ignore SIGTERM, as a pool of workers, with the engine's files
leak_bytes                    memory that a cancelled run does not give back
fail_at_step                  end the run FAILED with TRAINING at this step
signal_at_step, signal        die of this signal at this step
exit_at_step, exit_code       leave without a word at this step, with this status
ballast_bytes                 memory to hold while a run goes on
keep_checkpoints              delete all but so many (0: keep all)
survive_shim                  go on when the shim is gone
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_service.engine import durable
from gpu_service.journal import JournalFull, Writer, events
from gpu_service.journal.failpoints import failpoint
from tests.fakes import stub_generation
from tests.fakes.hanging import hang_up
from tunesmith.common.v1 import event_pb2, file_pb2, plan_pb2


class Stopped(Exception):
    """The run is to end: `mode` is cancel or checkpoint."""

    def __init__(self, mode: str) -> None:
        super().__init__(mode)
        self.mode = mode


class Control:
    """The engine's end of the pipe to the shim."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._rest = b""
        self.shim_gone = False

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.shim_gone = True

    def receive(self, timeout_seconds: float | None) -> list[dict[str, Any]]:
        if self.shim_gone:
            time.sleep(timeout_seconds or 0)
            return []
        readable, _, _ = select.select([self._socket], [], [], timeout_seconds)
        if not readable:
            return []
        data = self._socket.recv(65536)
        if not data:
            self.shim_gone = True
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


class StubEngine:
    """Serves runs one after another."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self.script: dict[str, Any] = {}
        self._shutting_down = False
        # Came while a generation was under way.
        self._waiting: list[dict[str, Any]] = []

    def serve(self) -> int:
        self._control.send({"type": "ready"})
        while not self._shutting_down and not self._control.shim_gone:
            self._waiting += [] if self._waiting else self._control.receive(None)
            while self._waiting:
                message = self._waiting.pop(0)
                if message["type"] == "start_run":
                    self._train(Path(message["run_directory"]))
                elif message["type"] == "shutdown":
                    self._shutting_down = True
                elif message["type"] == "generate" and not stub_generation.answer(
                    message, self._control.send, self._is_generation_over
                ):
                    return 70
        return 0

    def _is_generation_over(self, timeout_seconds: float) -> bool:
        received = self._control.receive(timeout_seconds)
        self._waiting += [message for message in received if message["type"] != "cancel_generate"]
        return self._control.shim_gone or any(
            message["type"] in ("cancel_generate", "start_run", "shutdown") for message in received
        )

    def _train(self, directory: Path) -> None:
        run = json.loads((directory / "run.json").read_text())
        self.script = json.loads(os.environ.get("TUNESMITH_STUB", "{}"))
        prompts = run["spec"].get("sample_prompts", [])
        if prompts:
            self.script.update(json.loads(prompts[0]["prompt"]))
        if self.script.get("ignore_stop"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with Writer.open(directory / "journal", run["attempt"]) as writer:
            state = StubRun(self, directory, run, writer).execute()
        resident = {"base_model": run["spec"].get("base_model", ""), "weights_digest": run["weights_digest"]}
        self._control.send(
            {
                "type": "run_finished",
                "run_directory": str(directory),
                "state": state,
                "resident": resident | {"bytes": 1},
            }
        )

    def notice(self, message: dict[str, Any]) -> None:
        self._control.send(message)

    def clear(self, directory: Path) -> bool:
        """Have the shim end what the run left; what else it says meanwhile is kept for later. False without a shim."""
        self._control.send({"type": "clear_run", "run_directory": str(directory)})
        while not self._control.shim_gone:
            received = self._control.receive(1)
            self._waiting += [message for message in received if message["type"] != "run_cleared"]
            if any(message["type"] == "run_cleared" for message in received):
                return True
        return False

    def obey(self, timeout_seconds: float) -> None:
        """Wait this long for orders; raises Stopped."""
        for message in self._control.receive(timeout_seconds):
            if self.script.get("ignore_stop"):
                continue
            if message["type"] == "shutdown":
                self._shutting_down = True
                raise Stopped("checkpoint")
            if message["type"] == "stop_run":
                raise Stopped(message["mode"])
        if self._control.shim_gone and not self.script.get("survive_shim"):
            sys.exit(9)


class StubRun:
    """One run, from its first event to its last."""

    def __init__(self, engine: StubEngine, directory: Path, run: dict[str, Any], writer: Writer) -> None:
        self._engine, self._directory, self._run, self._writer = engine, directory, run, writer
        self._script = engine.script
        hyperparameters = run["spec"].get("hyperparameters", {})
        self._total_steps = int(hyperparameters.get("num_steps", 5))
        self._save_every = int(hyperparameters.get("save_every_steps", 0))
        self._step = int(run["resume"]["step"]) if run["resume"] else 0

    def execute(self) -> str:
        self._state(event_pb2.RUN_STATE_ACCEPTED, event_pb2.RUN_STATE_RUNNING)
        # A run that had not begun when its engine was killed is not over: it goes to another one.
        self._ballast = b"x" * int(self._script.get("ballast_bytes", 0))
        try:
            self._prepare()
            while self._step < self._total_steps:
                self._reach(self._step + 1)
                self._engine.obey(float(self._script.get("step_seconds", 0.01)))
                self._train_one_step()
            self._phase("SAVING")
        except Stopped as stop:
            return self._end_stopped(stop.mode)
        except ArithmeticError as error:
            failure = events.failure(
                reason="TRAINING", fault="PLATFORM", message=str(error), exception_type=type(error).__qualname__
            )
            return self._end(event_pb2.RUN_STATE_FAILED, failure=failure)
        try:
            self._write_artifacts()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            shutil.rmtree(self._directory / "artifacts", ignore_errors=True)
            failure = events.failure(reason="DISK_FULL", fault="PLATFORM", message=str(error), stage="SAVING")
            return self._end(event_pb2.RUN_STATE_FAILED, failure=failure)
        return self._end(event_pb2.RUN_STATE_SUCCEEDED)

    def _prepare(self) -> None:
        self._phase("PLANNING")
        self._append(
            plan_pb2.Plan(
                level=plan_pb2.PLAN_LEVEL_EXACT,
                num_steps=self._total_steps,
                data_digest="d" * 64,
                weights_digest=self._run["weights_digest"],
                spec_digest=self._run["spec_digest"],
            )
        )
        self._phase("LOADING")
        for stage in event_pb2.LoadingStage.values()[1:]:
            for status in (event_pb2.STAGE_STATUS_STARTED, event_pb2.STAGE_STATUS_FINISHED):
                self._append(event_pb2.LoadingEvent(stage=stage, status=status, unit="tensors", done=1, total=1))
        if self._step:
            self._append(event_pb2.ResumedEvent(from_step=self._step, checkpoint=self._run["resume"]["checkpoint"]))
        if self._script.get("spawn_setsid_child"):
            # The intermediate process ends at once: the sleeper is an orphan in a session of its own.
            subprocess.run(["sh", "-c", "setsid sleep 600 & echo started"], check=True, stdout=subprocess.DEVNULL)
        for _ in range(int(self._script.get("spawn_pool", 0))):
            subprocess.Popen(["sh", "-c", "trap '' TERM INT HUP; echo; sleep 600"], stdout=subprocess.PIPE)
        self._phase("TRAINING")

    def _train_one_step(self) -> None:
        self._step += 1
        if self._script.get("signal_at_step") == self._step:
            os.kill(os.getpid(), int(self._script["signal"]))
        if self._script.get("exit_at_step") == self._step:
            os._exit(int(self._script.get("exit_code", 7)))
        if self._script.get("fail_at_step") == self._step:
            raise ArithmeticError(f"scripted failure at step {self._step}")
        self._append(
            event_pb2.StepEvent(
                step=self._step, total_steps=self._total_steps, epoch=1.0, loss=2.0 / self._step, learning_rate=1e-4
            )
        )
        if self._save_every and self._step % self._save_every == 0:
            self._save()

    def _end_stopped(self, mode: str) -> str:
        if mode == "cancel":
            return self._end(event_pb2.RUN_STATE_CANCELLED)
        if self._step:
            self._phase("SAVING")
            self._save()
        return self._end(event_pb2.RUN_STATE_INTERRUPTED)

    def _end(self, state: event_pb2.RunState.ValueType, failure: Any = None) -> str:
        is_clear = self._engine.clear(self._directory)
        if state == event_pb2.RUN_STATE_CANCELLED and (self._script.get("leak_bytes") or not is_clear):
            # As the real engine: only the end of the process gives it back, and the shim, or its burial, tells of it.
            os._exit(71)
        if state == event_pb2.RUN_STATE_SUCCEEDED:
            self._append(event_pb2.RealizedEvent(num_steps=self._step, data_digest="d" * 64))
            for artifact in json.loads((self._directory / "artifacts/manifest.json").read_text())["artifacts"]:
                kind = event_pb2.ArtifactKind.Value("ARTIFACT_KIND_" + artifact["kind"])
                files = [file_pb2.FileReference(**file) for file in artifact["files"]]
                self._append(event_pb2.ArtifactEvent(name=artifact["name"], kind=kind, files=files))
        self._append(event_pb2.MemoryReleasedEvent(freed_bytes=len(self._ballast), resident_bytes=1, seconds=0.01))
        failpoint("ending.before-terminal")
        self._state(event_pb2.RUN_STATE_RUNNING, state, failure)
        failpoint("ending.after-terminal")
        return event_pb2.RunState.Name(state).removeprefix("RUN_STATE_")

    def _save(self) -> None:
        """As the real one: a checkpoint without room is left out, and said."""
        try:
            self._write_checkpoint()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            shutil.rmtree(self._directory / f"checkpoints/.staging-step-{self._step:08d}", ignore_errors=True)
            self._append(event_pb2.WarningEvent(code="checkpoint-failed", message=str(error)))

    def _write_checkpoint(self) -> None:
        name = f"step-{self._step:08d}"
        content = f"{self._run['job_id']} step {self._step}".encode()
        directory = self._directory / "checkpoints" / name
        if directory.exists():
            return
        with durable.staged(directory) as staging:
            files = [write_file(staging, "adapter.safetensors", content)]
            manifest = {"name": name, "step": self._step, "files": files, "plan_digest": "p" * 64}
            raw = json.dumps(manifest).encode()
            failpoint("checkpoint.before-manifest")
            (staging / "manifest.json").write_bytes(raw)
        failpoint("checkpoint.before-event")
        self._append(
            event_pb2.CheckpointEvent(
                name=name,
                step=self._step,
                status=event_pb2.CHECKPOINT_STATUS_COMMITTED,
                size_bytes=len(content) + len(raw),
                manifest_sha256=hashlib.sha256(raw).hexdigest(),
                # With its manifest, as a real one's: without it no other node could go on from it.
                files=[file_pb2.FileReference(**file) for file in [*files, reference_of("manifest.json", raw)]],
            )
        )

        self._delete_old_checkpoints()

    def _delete_old_checkpoints(self) -> None:
        keep = int(self._script.get("keep_checkpoints", 0))
        for old in sorted((self._directory / "checkpoints").glob("step-*"))[:-keep] if keep else []:
            durable.delete(old)
            step = int(old.name.removeprefix("step-"))
            self._append(
                event_pb2.CheckpointEvent(name=old.name, step=step, status=event_pb2.CHECKPOINT_STATUS_DELETED)
            )

    def _write_artifacts(self) -> None:
        content = f"adapter of {self._run['job_id']} after {self._step} steps".encode()
        with durable.staged(self._directory / "artifacts") as root:
            adapter = [write_file(root / "adapter", "adapter_model.safetensors", content)]
            report = [write_file(root / "report", "metrics.json", b'{"steps": %d}' % self._step)]
            manifest = {
                "artifacts": [
                    {"name": "adapter", "kind": "ADAPTER", "files": adapter},
                    {"name": "report", "kind": "REPORT", "files": report},
                ]
            }
            failpoint("artifacts.before-manifest")
            (root / "manifest.json").write_text(json.dumps(manifest))
        failpoint("artifacts.before-event")

    def _reach(self, place: str | int) -> None:
        if self._script.get("freeze_at") == place:
            os.kill(os.getpid(), signal.SIGSTOP)
        hang = self._script.get("hang", {})
        if hang.get("at") == place:
            hang_up(hang["way"], self._directory)
        if self._script.get("hold_at") == place:
            while not Path(self._script["until_file"]).exists():
                self._engine.obey(0.02)

    def _phase(self, name: str) -> None:
        self._append(event_pb2.PhaseEvent(phase=event_pb2.Phase.Value(f"PHASE_{name}")))
        self._engine.notice({"type": "phase", "run_directory": str(self._directory), "phase": name})
        if name != "SAVING":
            self._engine.obey(float(self._script.get("phase_seconds", 0)))
        self._reach(name)

    def _state(self, previous: Any, state: Any, failure: Any = None) -> None:
        self._append(event_pb2.RunStateEvent(previous_state=previous, state=state, failure=failure))

    def _append(self, message: events.EventMessage) -> None:
        sequence = self._append_once_there_is_room(message)
        self._engine.notice({"type": "journal", "run_directory": str(self._directory), "run_sequence": sequence})

    def _append_once_there_is_room(self, message: events.EventMessage) -> int:
        while True:
            try:
                return self._writer.append(events.wrap(message))
            except JournalFull:
                # As the real engine: to wait for room is no hang.
                self._engine.notice({"type": "alive"})
                self._engine.obey(0.1)


def write_file(directory: Path, path: str, content: bytes) -> dict[str, Any]:
    """Write a file and say what it is, as a manifest does."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / path).write_bytes(content)
    return reference_of(path, content)


def reference_of(path: str, content: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"path": path, "sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}


def main() -> int:
    faulthandler.enable()
    faulthandler.register(signal.SIGRTMIN, all_threads=True)
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int, required=True)
    return StubEngine(Control(parser.parse_args().control_fd)).serve()


if __name__ == "__main__":
    sys.exit(main())
