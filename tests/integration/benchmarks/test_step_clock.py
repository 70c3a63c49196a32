"""The clock of a measured side: it follows torch's optimizers, counts what a turn says, and ends when told to."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.peers.turns import END, GO, PROFILE, TurnTaker


class _Taker(TurnTaker):
    """Answers from a list, and keeps what it was told."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__(io.StringIO("".join(json.dumps({"do": answer}) + "\n" for answer in answers)), io.StringIO())
        self.stages: list[str] = []

    def tell(self, stage: str, **facts: Any) -> None:
        self.stages.append(stage)


@pytest.fixture
def steps() -> Iterator[Any]:
    """A function that makes one optimizer step; hooks are taken away again."""
    import torch
    from torch.optim import optimizer as optimizers

    before = dict(optimizers._global_optimizer_post_hooks)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)

    def step() -> None:
        weight.grad = torch.ones(2)
        optimizer.step()

    yield step
    optimizers._global_optimizer_post_hooks.clear()
    optimizers._global_optimizer_post_hooks.update(before)


def test_turns_are_counted_without_their_first_step(steps: Any) -> None:
    from benchmarks.peers.clock import StepClock

    taker, ends = _Taker([GO, GO, END]), list[int]()
    clock = StepClock(taker=taker, end_training=lambda: ends.append(1), warmup_steps=3, turn_steps=2)
    for _ in range(3 + 2 * 3):
        assert not ends
        steps()
    assert taker.stages == ["warm-up", GO, GO]
    assert [[step for step, _ in turn] for turn in clock.intervals] == [[4, 5], [7, 8]]
    assert all(milliseconds > 0 for turn in clock.intervals for _, milliseconds in turn)
    assert ends == [1]


def test_the_ends_of_steps_are_told_but_of_the_last_ones_of_a_turn(steps: Any) -> None:
    from benchmarks.peers.clock import StepClock

    taker = _Taker([GO, GO, END])
    clock = StepClock(taker=taker, end_training=lambda: None, warmup_steps=1, turn_steps=3)
    before = []
    for _ in range(1 + 2 * 4):
        before.append(time.perf_counter())
        steps()
    assert list(clock.ends) == [1, 2, 5, 6]
    for step, end in clock.ends.items():
        assert before[step] < end < before[step + 1]


def test_steps_after_the_end_are_not_followed(steps: Any) -> None:
    from benchmarks.peers.clock import StepClock

    taker, ends = _Taker([END]), list[int]()
    StepClock(taker=taker, end_training=lambda: ends.append(1), warmup_steps=1, turn_steps=2)
    for _ in range(4):
        steps()
    assert (taker.stages, ends) == (["warm-up"], [1])


def test_profiled_steps_are_no_turn(steps: Any) -> None:
    from benchmarks.peers.clock import StepClock

    taker = _Taker([GO, PROFILE, END])
    clock = StepClock(taker=taker, end_training=lambda: None, warmup_steps=1, turn_steps=1)
    for _ in range(1 + 2 + 3):
        steps()
    assert taker.stages == ["warm-up", GO, PROFILE]
    assert len(clock.intervals) == 1
    assert clock.profile["steps"] == 3
    assert clock.profile["wall_milliseconds"] > 0
