"""A node of the simulation: accepts, trains, stops and loses runs in virtual time, by the GPU service's own rules of
fencing and of the memory ledger. Its network is `link`'s; what is written here is what lies on its disk."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from control_service.app.ports import StartRun
from control_service.domain.artifact import ArtifactKind, CheckpointStatus, FileReference
from control_service.domain.errors import AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted, TunesmithError
from control_service.domain.event import (
    ArtifactFact,
    CheckpointFact,
    Fact,
    PhaseFact,
    PlanFact,
    ResumedFact,
    RunStateFact,
    StepFact,
    StoredEvent,
)
from control_service.domain.failure import Failure, Fault
from control_service.domain.node import Device, NodeCapabilities, NodeModel, NodeReport
from control_service.domain.run import ObservedRun, Phase, RunState, StopMode
from gpu_service.domain import fencing
from gpu_service.domain.errors import Refusal
from gpu_service.domain.memory import MemoryLedger
from tests.fakes.control_codec import PickleCodec
from tests.faults.simulation.run import WEIGHTS_DIGEST, Script, SimRun

_CODEC = PickleCodec()
_REFUSALS: dict[str, type[TunesmithError]] = {
    "RUN_CONFLICT": AlreadyExists,
    "STALE_EPOCH": FailedPrecondition,
    "NODE_BUSY": ResourceExhausted,
}


class SimNode:
    """One machine. `script_of` says how an attempt goes."""

    def __init__(
        self,
        name: str,
        *,
        num_devices: int,
        dice: random.Random,
        script_of: Callable[[StartRun], Script],
        rate: float = 1.0,
        ahead_seconds: float = 0.0,
    ) -> None:
        """`rate`: of its clocks to true time; `ahead_seconds`: what its time of day began wrong by."""
        self.name = name
        self.rate = rate
        self._ahead_seconds = ahead_seconds
        self.num_devices = num_devices
        self._dice = dice
        self._script_of = script_of
        self.instance = 1
        self.is_serving = True
        self.installation_id = ""
        self.highest: dict[str, int] = {}
        self.runs: dict[tuple[str, int], SimRun] = {}
        # Every run that there ever was, also those that were released or lost with their disk.
        self.history: list[SimRun] = []
        self.blobs: dict[str, bytes] = {}
        self.ledger = MemoryLedger()
        self.start_error: TunesmithError | None = None
        # Jobs that it once said to be too small for.
        self.too_small_for: set[str] = set()
        self._change = asyncio.Event()

    # What control asks.

    def capabilities(self) -> NodeCapabilities:
        model = NodeModel(
            name="org/base",
            config_type="llama",
            weights_digest=WEIGHTS_DIGEST,
            size_bytes=1,
            num_parameters=1,
            vocabulary_size=1,
            has_chat_template=True,
        )
        return NodeCapabilities(node_name=self.name, instance_id=self._instance_id(), models=(model,))

    def report(self) -> NodeReport:
        devices = self._devices()
        return NodeReport(
            node_name=self.name,
            instance_id=self._instance_id(),
            devices=tuple(
                Device(index=n, type="cuda", name="sim", total_memory_bytes=1, free_memory_bytes=1)
                for n in range(self.num_devices)
            ),
            runs=tuple(run.observed() for run in self.runs.values()),
            accepting=any(self.ledger.holder_of(device) is None for device in devices),
        )

    def start(self, request: StartRun) -> ObservedRun:
        """As `gpu_service.runs.manager` decides it."""
        if self.installation_id not in ("", request.key.installation_id):
            raise FailedPrecondition("WRONG_INSTALLATION", "another installation's")
        if self.start_error is not None:
            if self.start_error.reason == "DOES_NOT_FIT":
                self.too_small_for.add(request.key.job_id)
            raise self.start_error
        key = (request.key.job_id, request.key.attempt)
        known = self.runs.get(key)
        try:
            admission = fencing.admit(
                attempt=key[1],
                spec_digest=request.spec_digest,
                highest_attempt=self.highest.get(key[0], 0),
                known_digest=known.request.spec_digest if known else None,
            )
            if known is not None and admission is fencing.Admission.SAME_RUN:
                return known.observed()
            older = [run for run in self.runs.values() if run.request.key.job_id == key[0] and not run.is_over]
            device = self._free_device([run.name for run in older])
            self._check_content(request)
            holder = self.ledger.holder_of(device)
            if holder is not None:
                self.ledger.release(holder)
            self.ledger.reserve(run_id=f"{key[0]}/{key[1]}", device_id=device, num_bytes=1, capacity_bytes=1)
        except Refusal as refusal:
            raise _REFUSALS[refusal.reason](refusal.reason, refusal.message, details=refusal.details) from refusal
        run = SimRun(request=request, script=self._script_of(request), device_id=device)
        self.runs[key] = run
        self.history.append(run)
        self.highest[key[0]] = key[1]
        self.installation_id = request.key.installation_id
        self._begin(run, older)
        self.changed()
        return run.observed()

    def stop(self, job_id: str, attempt: int, mode: StopMode) -> ObservedRun | None:
        run = self.runs.get((job_id, attempt))
        if run is None:
            return None
        if not run.is_over:
            # A cancel stays a cancel.
            run.stop = mode if run.stop is not StopMode.CANCEL else run.stop
            run.state = RunState.STOPPING
            self.changed()
        return run.observed()

    def release(self, job_id: str, attempt: int) -> int:
        run = self.runs.get((job_id, attempt))
        if run is None:
            return 0
        if not run.is_over:
            raise FailedPrecondition("JOB_STATE", "is not over")
        del self.runs[job_id, attempt]
        self.changed()
        return 1

    def read(self, sha256: str) -> bytes:
        if sha256 not in self.blobs:
            raise NotFound("BLOB_NOT_FOUND", sha256)
        return self.blobs[sha256]

    # What happens to it.

    def restart_server(self, *, is_serving: bool) -> None:
        """The server process ends, or begins again; engines and their runs go on."""
        self.is_serving = is_serving
        self.instance += 0 if is_serving else 1
        self.changed()

    def lose_power(self) -> None:
        """Everything on it ends; what was not yet synced is gone."""
        self.restart_server(is_serving=False)
        for run in self.runs.values():
            if run.task is not None:
                run.task.cancel()
            if not run.is_over and run.journal:
                lost = min(self._dice.choice((0, 0, 1, 2)), _num_unsynced(run.journal))
                del run.journal[len(run.journal) - lost :]
                run.torn |= lost > 0

    def come_back(self, *, wiped: bool = False) -> None:
        """After a power loss: buries what ran; or, wiped, it is a new machine of the same name."""
        if wiped:
            self.runs, self.blobs, self.highest, self.ledger = {}, {}, {}, MemoryLedger()
            self.installation_id = ""
        for run in self.runs.values():
            if not run.is_over:
                self._fail(run, Failure(reason="ENGINE_LOST", fault=Fault.HARDWARE, message="the machine ended"))
        self.restart_server(is_serving=True)

    def kill_engine(self) -> bool:
        """The engine of a run that goes on is killed; False when there is none."""
        live = [run for run in self.runs.values() if not run.is_over and run.task is not None]
        if not live:
            return False
        run = self._dice.choice(live)
        assert run.task is not None
        run.task.cancel()
        if run.stop is StopMode.CANCEL:
            self._end(run, RunState.CANCELLED)
        else:
            self._fail(run, Failure(reason="ENGINE_KILLED", fault=Fault.PLATFORM, message="killed", signal=9))
        return True

    def stop_everything(self) -> None:
        """The simulation is over."""
        for run in self.history:
            if run.task is not None:
                run.task.cancel()

    def changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def wait_changed(self) -> None:
        await self._change.wait()

    # Training.

    def _begin(self, run: SimRun, older: list[SimRun]) -> None:
        run.task = asyncio.get_running_loop().create_task(self._train(run, older), name=f"engine-{run.name}")

    async def _train(self, run: SimRun, older: list[SimRun]) -> None:
        for earlier in older:
            self.stop(earlier.request.key.job_id, earlier.request.key.attempt, StopMode.CANCEL)
        while any(not earlier.is_over for earlier in older):
            await self.wait_changed()
        await asyncio.sleep(run.script.step_seconds / self.rate)
        self._emit(run, RunStateFact(state=RunState.RUNNING), PhaseFact(phase=Phase.PLANNING))
        if run.stop is None:
            run.state = RunState.RUNNING
        self._emit(run, PlanFact(num_steps=run.script.num_steps, weights_digest=WEIGHTS_DIGEST, data_digest="d" * 64))
        resume = run.request.resume_from
        if resume is not None:
            run.step = resume.step
            self._emit(run, ResumedFact(from_step=resume.step, checkpoint=resume.checkpoint))
        self._emit(run, PhaseFact(phase=Phase.TRAINING))
        while run.step < run.script.num_steps:
            await asyncio.sleep(run.script.step_seconds / self.rate)
            if run.stop is not None:
                await asyncio.sleep(run.script.stop_seconds)
                self._obey(run)
                return
            self._make_step(run)
            if run.step == run.script.fail_at_step and run.script.failure is not None:
                self._fail(run, run.script.failure)
                return
        await asyncio.sleep(run.script.step_seconds / self.rate)
        file = self.add_file(f"adapter of {run.request.key.job_id}".encode(), "adapter_model.safetensors")
        self._emit(run, ArtifactFact(name="adapter", kind=ArtifactKind.ADAPTER, files=(file,)))
        self._end(run, RunState.SUCCEEDED)

    def _make_step(self, run: SimRun) -> None:
        run.step += 1
        total = run.script.num_steps
        fact = StepFact(
            step=run.step, total_steps=total, epoch=0.5, loss=1.0, tokens_per_second=9.0, remaining_seconds=1.0
        )
        self._emit(run, fact)
        if run.script.save_every and run.step % run.script.save_every == 0:
            self._save(run)

    def _save(self, run: SimRun) -> None:
        name = f"step-{run.step:08d}"
        file = self.add_file(f"{run.request.key.job_id} {name}".encode(), f"{name}.safetensors")
        run.checkpoints[name] = file
        self._emit(
            run,
            CheckpointFact(
                name=name,
                step=run.step,
                status=CheckpointStatus.COMMITTED,
                size_bytes=file.size_bytes,
                manifest_sha256="m" * 64,
                files=(file,),
            ),
        )

    def _obey(self, run: SimRun) -> None:
        if run.stop is StopMode.CANCEL:
            self._end(run, RunState.CANCELLED)
            return
        if run.step:
            self._save(run)
        self._end(run, RunState.INTERRUPTED)

    def _fail(self, run: SimRun, failure: Failure) -> None:
        run.failure = failure
        if failure.reason == "DOES_NOT_FIT":
            self.too_small_for.add(run.request.key.job_id)
        self._end(run, RunState.FAILED)

    def _end(self, run: SimRun, state: RunState) -> None:
        run.state = state
        self.ledger.release(run.name)
        self._emit(run, RunStateFact(state=state, failure=run.failure))

    def _emit(self, run: SimRun, *facts: Fact) -> None:
        for fact in facts:
            kind, payload = _CODEC.encode(fact)
            event = StoredEvent(
                sequence=0,
                attempt=run.request.key.attempt,
                run_sequence=len(run.journal) + 1,
                kind=kind,
                time=self._utc_now(),
                payload=payload,
            )
            run.journal.append(event)
        self.changed()

    def _utc_now(self) -> datetime:
        seconds = asyncio.get_running_loop().time() * self.rate + self._ahead_seconds
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)

    def add_file(self, data: bytes, path: str) -> FileReference:
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        return FileReference(path=path, sha256=sha256, size_bytes=len(data))

    # Placing.

    def _check_content(self, request: StartRun) -> None:
        resume = request.resume_from
        needed = {dataset.sha256 for dataset in request.spec.datasets}
        if resume is not None and resume.files:
            needed |= {file.sha256 for file in resume.files}
        elif resume is not None:
            earlier = self.runs.get((request.key.job_id, resume.attempt))
            if earlier is None or resume.checkpoint not in earlier.checkpoints:
                raise NotFound("CHECKPOINT_NOT_FOUND", f"no checkpoint {resume.checkpoint} is here")
        if not needed <= self.blobs.keys():
            raise FailedPrecondition("BLOB_NOT_FOUND", "a blob is missing")

    def _free_device(self, leaving: list[str]) -> str:
        for device in self._devices():
            if self.ledger.holder_of(device) is None:
                return device
        for device in self._devices():
            if self.ledger.holder_of(device) in leaving:
                return device
        raise ResourceExhausted("NODE_BUSY", "no device is free")

    def _devices(self) -> list[str]:
        return [f"cuda:{index}" for index in range(self.num_devices)]

    def _instance_id(self) -> str:
        return f"{self.name}-{self.instance}"


def _num_unsynced(journal: list[StoredEvent]) -> int:
    """Events at the end that are steps: all others are synced before anybody reads them."""
    count = 0
    for event in reversed(journal):
        if not isinstance(_CODEC.decode(event.kind, event.payload), StepFact):
            break
        count += 1
    return count
