"""The power goes at every moment of an engine's saving and pruning of checkpoints, with real tensors. Needs torch."""

from __future__ import annotations

from tests.faults.scenario import Finding, Scenario, Trial
from tests.faults.scenarios.power_loss import lose_power_everywhere


def run(trial: Trial) -> list[Finding]:
    """Each writer of an engine."""
    # Scenarios are listed without torch.
    from tests.faults.power_loss.engine_writers import ENGINE_WRITERS

    return [lose_power_everywhere(trial, writer) for writer in ENGINE_WRITERS]


SCENARIO = Scenario(name="power_loss_engine", promises=("R19",), num_trials=8, trial_seconds=10.0, run=run)
