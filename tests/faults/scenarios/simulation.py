"""Schedules of faults in virtual time: control's real core against nodes in memory, one thousand schedules a trial."""

from __future__ import annotations

from tests.faults.scenario import Finding, Scenario, Trial
from tests.faults.simulation.world import simulate

_SCHEDULES_PER_TRIAL = 1000
_PROMISES = ("R1", "R2", "R3", "R4", "R8", "R23", "R25")


def run(trial: Trial) -> list[Finding]:
    """Carries out schedules from the trial's seed on; each violation names the seed that replays it."""
    return findings(first_seed=trial.seed * _SCHEDULES_PER_TRIAL, count=_SCHEDULES_PER_TRIAL)


def findings(*, first_seed: int, count: int) -> list[Finding]:
    """What `count` schedules say; every schedule tries every promise."""
    violations = []
    for seed in range(first_seed, first_seed + count):
        outcome = simulate(seed)
        if outcome.broken:
            violations.append(f"python -m tests.faults.simulation --seed {seed}: {outcome.broken}")
    return [
        Finding(promise=promise, tried=count, held=count - len(violations), violations=tuple(violations))
        for promise in _PROMISES
    ]


SCENARIO = Scenario(name="simulation", promises=_PROMISES, num_trials=10, trial_seconds=60.0, run=run)
