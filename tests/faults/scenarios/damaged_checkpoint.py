"""The newest checkpoint is damaged while its engine is stopped, which then dies: a byte flips, a file is cut or gone.
The next attempt notices, and goes on from control's copy or from the checkpoint before (R19). A real engine."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults.checker.contents import directory_problem
from tests.faults.driver import World, WorldConfig
from tests.faults.driver.verdict import ended_as_asked, judge
from tests.faults.driver.world import OVER
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import event_pb2, training_spec_pb2

_SAVE_EVERY_STEPS = 10
_NUM_STEPS = 150
_TRAINING_SECONDS = 300.0


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


_DAMAGES: Sequence[tuple[Callable[[Path], None], str]] = (
    (_flip, "weights.safetensors"),
    (_cut, "weights.safetensors"),
    (_flip, "optimizer.safetensors"),
    (_cut, "trainer.json"),
    (_flip, "random.safetensors"),
    (_cut, "manifest.json"),
    (Path.unlink, "optimizer.json"),
)


def run(trial: Trial) -> list[Finding]:
    """One kind of damage; every other time control has a copy of the checkpoint."""
    damage, name = _DAMAGES[trial.seed % len(_DAMAGES)]
    has_copy = trial.seed % 2 == 1
    flags = {} if has_copy else {"replicate-checkpoint-max-bytes": 0}
    config = WorldConfig(directory=trial.directory, seed=trial.seed, real_engine=True, control_flags=flags)
    with World(config) as world:
        project_id = world.create_project(
            "training",
            [world.upload("rows")],
            num_steps=_NUM_STEPS,
            save_every_steps=_SAVE_EVERY_STEPS,
            keep_checkpoints=2,
            max_length=64,
            batch=training_spec_pb2.Batch(examples=4),
            lora=training_spec_pb2.Lora(rank=4),
        )
        job_id = world.start_job(project_id)
        world.wait_for_step(job_id, 2 * _SAVE_EVERY_STEPS + 2, seconds=_TRAINING_SECONDS)
        assert world.signal_engine(signal.SIGSTOP, "stop", job_id=job_id), "the job was over before its engine stopped"
        told = world.wait_for("the checkpoints to be told", lambda: _told(world, job_id, has_copy=has_copy))
        newest = world.node_directories["a"] / "runs" / job_id / "1" / "checkpoints" / told[-1]
        before = newest.with_name(told[-2])
        problem = directory_problem(before)
        damage(newest / name)
        world.signal_engine(signal.SIGKILL, "kill", job_id=job_id)
        world.continue_all()
        states = {job_id: world.wait_for_state(job_id, *OVER, seconds=_TRAINING_SECONDS)}
        world.wait_until_over()
        events = world.events(job_id)
        # What a trial damages on purpose is not the product's to answer for.
        if newest.exists():
            newest.rename(newest.with_name(f".damaged-{newest.name}"))
        world.stop()
        resumed = [event.payload.resumed.checkpoint for event in events if event.kind == event_pb2.EVENT_KIND_RESUMED]
        expected = told[-1] if has_copy else told[-2]
        violations = [f"{name} of {told[-1]} was damaged; training went on from {resumed}, not {expected}"]
        finding = Finding(
            promise="R19",
            tried=2,
            held=(resumed == [expected]) + (problem is None),
            violations=(
                *(violations if resumed != [expected] else ()),
                *((f"the checkpoint before was not whole: {problem}",) if problem else ()),
            ),
        )
        succeeded = {job_id: {event_pb2.JOB_STATE_SUCCEEDED}}
        return [*judge(world), ended_as_asked(world, states, succeeded), finding]


def _told(world: World, job_id: str, *, has_copy: bool) -> list[str]:
    """Names of the checkpoints that the log has, once there are two and the newest has a copy where one is made."""
    checkpoints = [event.payload.checkpoint for event in world.events(job_id) if event.payload.HasField("checkpoint")]
    committed = [one.name for one in checkpoints if one.status == event_pb2.CHECKPOINT_STATUS_COMMITTED]
    copied = {one.name for one in checkpoints if one.status == event_pb2.CHECKPOINT_STATUS_REPLICATED}
    return committed if len(committed) > 1 and (committed[-1] in copied or not has_copy) else []


SCENARIO = Scenario(
    name="damaged_checkpoint",
    promises=("R4", "R7", "R8", "R9", "R19"),
    num_trials=2 * len(_DAMAGES),
    trial_seconds=80.0,
    run=run,
    real_engine=True,
)
