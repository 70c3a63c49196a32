"""Users, nodes and crashes at random, by a seed: afterwards every job is over, every log is whole, nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace

import pytest

from control_service.domain.errors import TunesmithError
from control_service.domain.job_state import JobState
from control_service.domain.run import RunState
from tests.fakes.control_core import Core, quick_config
from tests.fakes.control_node import FakeNode, FakeRun
from tests.integration.control_core.conftest import OpenCore

_MAX_JOBS = 8


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_whatever_happens_every_log_is_whole(open_core: OpenCore, seed: int) -> None:
    dice = random.Random(seed)
    nodes = [FakeNode(name) for name in "abc"]
    config = quick_config()
    core = await open_core(*nodes, config=replace(config, nodes=replace(config.nodes, lease_seconds=0.3)))
    await core.reachable()
    project = await core.project()
    job_ids: list[str] = []
    for _ in range(80):
        # A verb that the state does not allow, or a silent node, is part of the game.
        with contextlib.suppress(TunesmithError):
            await _do_something(dice, core, nodes, project.project_id, job_ids)
        await asyncio.sleep(0)
    for node in nodes:
        node.set_up(True)
    async with asyncio.timeout(60):
        while not await _all_are_over(core, nodes, job_ids):  # noqa: ASYNC110 - it helps the jobs on
            await asyncio.sleep(0.01)

    for job_id in job_ids:
        log = await core.log(job_id)
        assert [event.sequence for event in log] == list(range(1, len(log) + 1))
        newest: dict[int, int] = {}
        for event in log:
            if event.run_sequence:
                assert event.run_sequence == newest.get(event.attempt, 0) + 1
                newest[event.attempt] = event.run_sequence
        assert await core.watch(job_id) == log


async def _do_something(
    dice: random.Random, core: Core, nodes: list[FakeNode], project_id: int, job_ids: list[str]
) -> None:
    action = dice.choice(["start", "run", "run", "run", "cancel", "pause", "resume", "node", "restart"])
    if action == "start" and len(job_ids) < _MAX_JOBS:
        job_ids.append((await core.start(project_id)).job_id)
    elif action == "run":
        live = [run for node in nodes for run in node.runs.values() if run.state is RunState.RUNNING]
        if live:
            _advance(dice, dice.choice(live))
    elif action == "node":
        node = dice.choice(nodes)
        node.set_up(not node.is_up)
    elif action == "restart" and dice.random() < 0.3:
        await core.restart()
    elif job_ids and action in ("cancel", "pause", "resume"):
        await getattr(core, action)(dice.choice(job_ids))


def _advance(dice: random.Random, run: FakeRun) -> None:
    number = len(run.events)
    action = dice.choice(["step", "step", "checkpoint", "kill", "break", "interrupt", "succeed"])
    if action == "step":
        run.step(number)
    elif action == "checkpoint":
        run.checkpoint(number)
    elif action == "interrupt":
        run.end(RunState.INTERRUPTED)
    elif action == "succeed":
        run.succeed(run.request.key.job_id.encode())
    else:
        run.fail("ENGINE_KILLED" if action == "kill" else "TRAINING")


async def _all_are_over(core: Core, nodes: list[FakeNode], job_ids: list[str]) -> bool:
    """Helps every job on to its end."""
    for run in [run for node in nodes for run in node.runs.values()]:
        if run.state is RunState.RUNNING:
            run.succeed(run.request.key.job_id.encode())
    jobs = [(await core.view(job_id)).job for job_id in job_ids]
    for job in jobs:
        if job.state is JobState.PAUSED:
            await core.resume(job.job_id)
    return all(job.is_over for job in jobs)
