"""R21: each place at which the pair writes is out of room once, with the stub engine and with a real one."""

from __future__ import annotations

from tests.faults.full_disk import run_trial
from tests.faults.scenario import Finding, Scenario, Trial

# In the order of what they break: control's database, its bytes, a backup; the node's saves, starts, events and ends.
STUB_TRIALS = ("database", "blobs", "backup", "save", "start", "journal", "cancel", "killed")


def _run_stub(trial: Trial) -> list[Finding]:
    return run_trial(STUB_TRIALS[trial.seed % len(STUB_TRIALS)], trial.directory)


def _run_real(trial: Trial) -> list[Finding]:
    return run_trial("training", trial.directory)


SCENARIO = Scenario(
    name="disk-full",
    promises=("R21",),
    # Each kind a few times: when exactly the disk is full differs from one to the next.
    num_trials=32,
    trial_seconds=15.0,
    run=_run_stub,
)
REAL_SCENARIO = Scenario(
    name="disk-full-real",
    promises=("R21",),
    num_trials=4,
    trial_seconds=60.0,
    run=_run_real,
    real_engine=True,
)
