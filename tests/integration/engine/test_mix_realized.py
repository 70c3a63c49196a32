"""What a mix of tokens, held-out fractions and packed batches planned is what training reports as realized."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fakes.engine_runs import TraitRows, Workspace
from tests.fakes.plans import write_rows


def make_packed_run(workspace: Workspace, job_id: str, **hyperparameters: Any) -> Path:
    """Two traits of unlike sizes; a quarter of each is held out, and percentages count target tokens."""
    directory = workspace.make_run(
        job_id,
        traits=(
            TraitRows(trait_type="a", rows=write_rows(20, seed=1)),
            TraitRows(trait_type="b", rows=write_rows(60, seed=2), held_out=write_rows(3, seed=3)),
        ),
        hyperparameters={"batch": {"tokens": "192", "micro_batch_tokens": "96"}, "num_steps": 7, **hyperparameters},
    )
    path = directory / "run.json"
    request = json.loads(path.read_text())
    request["spec"]["mix"] = {"unit": "target_tokens"}
    for trait in request["spec"]["traits"]:
        trait["held_out_fraction"] = 0.25
    path.write_text(json.dumps(request))
    return directory


def test_realized_is_what_was_planned(workspace: Workspace, run_in_process: Any) -> None:
    log = run_in_process(make_packed_run(workspace, "packed"))
    assert log.states == ["RUNNING", "SUCCEEDED"], log.payloads[-1]
    (plan,), (realized,) = log.of("plan"), log.of("realized")
    data = workspace.open_data(plan.data_digest)
    assert realized.data_digest == plan.data_digest == data.compute_digest()
    planned = [row for row in plan.datasets if not row.held_out]
    assert [(row.trait_type, row.dataset_id) for row in planned] == [("a", 1), ("b", 2)]
    fields = ("trait_type", "dataset_id", "run_examples", "run_tokens", "run_target_tokens")
    assert [[getattr(row, name) for name in fields] for row in realized.datasets] == [
        [getattr(row, name) for name in fields] for row in planned
    ]
    steps = log.of("step")
    assert len(steps) == plan.num_steps == realized.num_steps == 7
    assert max(step.num_tokens for step in steps) == plan.largest_step_tokens <= 192
    assert [step.num_examples for step in steps] == [len(data.step_examples(step)) for step in range(7)]
    assert plan.fill == sum(step.num_tokens for step in steps) / (7 * 192)
    assert plan.num_epochs == steps[-1].epoch
    held_out = Counter((row.trait_type, row.num_examples) for row in plan.datasets if row.held_out)
    assert held_out == {("a", 5): 1, ("b", 15): 1, ("b", 3): 1}
    base = log.of("evaluation")[0]
    assert sum(loss.num_target_tokens for loss in base.losses if loss.dataset_id) == sum(
        row.num_target_tokens for row in plan.datasets if row.held_out
    )


def test_a_run_that_stopped_early_has_the_digest_of_its_steps(workspace: Workspace, run_in_process: Any) -> None:
    log = run_in_process(make_packed_run(workspace, "early", num_steps=100_000, max_duration_seconds="1"))
    (plan,), (realized,) = log.of("plan"), log.of("realized")
    assert realized.stopped_early
    data = workspace.open_data(plan.data_digest)
    assert realized.data_digest == data.compute_digest(realized.num_steps) != plan.data_digest
