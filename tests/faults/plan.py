"""Which trials there are, and which shard has which: the same for everybody who asks with the same numbers. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tests.faults.scenario import Scenario


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTrial:
    """One trial of a scenario; its number, from 0, is its seed."""

    scenario: str
    number: int
    seconds: float
    # See `Scenario`.
    alone: bool = False

    @property
    def name(self) -> str:
        """Of its directory, and in the progress file."""
        return f"{self.scenario}-{self.number:04d}"


def plan_trials(
    scenarios: Sequence[Scenario], *, only: Collection[str] = (), count: int | None = None
) -> list[PlannedTrial]:
    """Every trial of the scenarios named in `only` (none: of all); `count` of each instead of the full number.

    KeyError for a name that is no scenario's.
    """
    known = {scenario.name: scenario for scenario in scenarios}
    wanted = [known[name] for name in only] or list(scenarios)
    return [
        PlannedTrial(scenario=scenario.name, number=number, seconds=scenario.trial_seconds, alone=scenario.alone)
        for scenario in wanted
        for number in range(scenario.num_trials if count is None else count)
    ]


def take_shard(trials: Sequence[PlannedTrial], *, shard: int, num_shards: int) -> list[PlannedTrial]:
    """The trials of shard `shard`, from 1: the longest first, each to the shard that has least so far."""
    loads = [0.0] * num_shards
    taken = []
    for trial in sorted(trials, key=lambda trial: (-trial.seconds, trial.name)):
        least = min(range(num_shards), key=lambda index: loads[index])
        loads[least] += trial.seconds
        if least == shard - 1:
            taken.append(trial)
    return taken


def parse_shard(text: str) -> tuple[int, int]:
    """`2/6` as (2, 6). ValueError for anything else."""
    shard, separator, num_shards = text.partition("/")
    found = int(shard), int(num_shards or 0)
    if not separator or not 1 <= found[0] <= found[1]:
        raise ValueError(f"a shard is i/n with i from 1 to n, not {text!r}")
    return found
