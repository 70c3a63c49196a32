"""The power goes at every moment of what a writer of ours does, and again with what was not synced surviving at random.

A seed chooses what survives, and, for those that can be killed, where the process before it had died.
"""

from __future__ import annotations

import random

from tests.faults.power_loss.control_writers import CONTROL_WRITERS
from tests.faults.power_loss.harness import SURE_FATES, Outcome, Writer, lose_power, record
from tests.faults.power_loss.node_writers import NODE_WRITERS
from tests.faults.power_loss.replay import at_random
from tests.faults.power_loss.store_writers import STORE_WRITERS
from tests.faults.scenario import Finding, Scenario, Trial

WRITERS: tuple[Writer, ...] = (*NODE_WRITERS, *STORE_WRITERS, *CONTROL_WRITERS)
_NUM_RANDOM_FATES = 6
_NUM_KILLS = 2


def run(trial: Trial) -> list[Finding]:
    """Every writer, once."""
    return [lose_power_everywhere(trial, writer) for writer in WRITERS]


def lose_power_everywhere(trial: Trial, writer: Writer) -> Finding:
    """Every moment of the writer's work; where it can be, also after a process was killed at a random call of `os`."""
    seeded, root, outcome = (
        random.Random(f"{trial.seed} {writer.name}"),
        trial.directory / writer.name / "root",
        Outcome(),
    )
    recording = record(writer, root)
    fates = [*SURE_FATES, *(at_random(seeded.randrange(2**32)) for _ in range(_NUM_RANDOM_FATES))]
    lose_power(writer, root, recording, fates, outcome)
    if writer.can_be_killed:
        for _ in range(_NUM_KILLS):
            killed = record(writer, root, kill_at=seeded.randint(1, recording.num_calls))
            lose_power(writer, root, killed, [*SURE_FATES, at_random(seeded.randrange(2**32))], outcome)
    return Finding(
        promise=writer.promise,
        tried=outcome.num_states,
        held=outcome.num_states - outcome.num_broken,
        violations=tuple(outcome.problems[:50]),
    )


SCENARIO = Scenario(
    name="power_loss",
    promises=tuple(sorted({writer.promise for writer in WRITERS})),
    num_trials=40,
    trial_seconds=15.0,
    run=run,
)
