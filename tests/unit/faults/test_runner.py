"""Shards are the same for everybody, what was carried out is not run again, and a promise's line adds it all up."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults import runner
from tests.faults.plan import PlannedTrial, parse_shard, plan_trials, take_shard
from tests.faults.report import append_results, render
from tests.faults.runner import TrialResult, run_trials
from tests.faults.scenario import Finding, Scenario, Trial
from tests.faults.scenarios import SCENARIOS


def scenario(name: str, *, num_trials: int, trial_seconds: float) -> Scenario:
    return Scenario(
        name=name, promises=("R1",), num_trials=num_trials, trial_seconds=trial_seconds, run=lambda trial: []
    )


MANY = (scenario("long", num_trials=7, trial_seconds=50), scenario("short", num_trials=90, trial_seconds=2))


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_shards_share_all_trials_evenly(num_shards: int) -> None:
    trials = plan_trials(MANY)
    shards = [take_shard(trials, shard=number, num_shards=num_shards) for number in range(1, num_shards + 1)]
    assert sorted(trial.name for shard in shards for trial in shard) == sorted(trial.name for trial in trials)
    loads = [sum(trial.seconds for trial in shard) for shard in shards]
    assert max(loads) - min(loads) <= 50


def test_only_some_scenarios_and_fewer_trials() -> None:
    assert [trial.name for trial in plan_trials(MANY, only=["long"], count=2)] == ["long-0000", "long-0001"]
    with pytest.raises(KeyError):
        plan_trials(MANY, only=["unknown"])


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", ""])
def test_a_shard_is_one_of_several(text: str) -> None:
    assert parse_shard("2/3") == (2, 3)
    with pytest.raises(ValueError, match=r"."):
        parse_shard(text)


def test_every_scenario_has_a_name_of_its_own_and_says_what_it_tries() -> None:
    assert len({one.name for one in SCENARIOS}) == len(SCENARIOS)
    for one in SCENARIOS:
        assert one.promises, one.name
        assert one.num_trials > 0, one.name


def finding(held: int) -> Finding:
    violations = ("one was lost",) if held < 2 else ()
    return Finding(
        promise="R1", tried=2, held=held, violations=violations, worst=float(held), unit="s", what="that long"
    )


def test_what_was_carried_out_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    held = {"good": 2, "bad": 1}

    def carry_out(trial: PlannedTrial, directory: Path) -> str:
        ran.append(trial.name)
        if trial.scenario == "broken":
            return "it could not be carried out"
        found = [vars_of(finding(held[trial.scenario]))]
        (directory / runner.FINDINGS_FILE).write_text(json.dumps(found))
        (directory / "faults.jsonl").write_text(
            '{"kind": "kill", "target": "engine"}\n{"kind": "stop", "target": ""}\n'
        )
        return ""

    monkeypatch.setattr(runner, "_carry_out", carry_out)
    trials = [PlannedTrial(scenario=name, number=0, seconds=1.0) for name in ("good", "bad", "broken")]
    results = run_trials(trials, work_directory=tmp_path, num_at_once=2)
    assert [result.is_good for result in results] == [True, False, False]
    assert not (tmp_path / "trials" / "good-0000").exists()
    assert (tmp_path / "trials" / "bad-0000" / "faults.jsonl").exists()
    ran.clear()
    run_trials(trials, work_directory=tmp_path, num_at_once=2)
    # A promise that did not hold stays broken, however often one tries again.
    assert ran == ["broken-0000"]
    lines = render(results, real_engine=["good"])
    assert lines[0] == "R1   tried       4  held       3  worst 2.00 s (that long)  BROKEN"
    assert lines[1:] == [
        "kills 2, of which 1 hit a real engine that trains or its shim",
        "trials 3, not carried out 1",
    ]


def vars_of(found: Finding) -> dict[str, object]:
    names = ("promise", "tried", "held", "violations", "worst", "unit", "what")
    return {name: getattr(found, name) for name in names}


def test_results_are_appended_by_commit(tmp_path: Path) -> None:
    result = TrialResult(trial="good-0000", scenario="good", seconds=1.0, num_kills=3, findings=[vars_of(finding(2))])
    for shard in ("1/2", "2/2"):
        append_results(tmp_path / "results.jsonl", [result], commit="abc", shard=shard)
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [record["shard"] for record in records] == ["1/2", "1/2", "2/2", "2/2"]
    assert {record["commit"] for record in records} == {"abc"}
    assert [record.get("held", record.get("kills")) for record in records] == [2, 3, 2, 3]


def test_a_trial_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    def run(trial: Trial) -> list[Finding]:
        (trial.directory / "seed").write_text(str(trial.seed))
        return [finding(2)]

    one = Scenario(name="one", promises=("R1",), num_trials=1, trial_seconds=1.0, run=run)
    runner.carry_out(one, number=7, directory=tmp_path)
    assert (tmp_path / "world" / "seed").read_text() == "7"
    assert json.loads((tmp_path / runner.FINDINGS_FILE).read_text())[0]["held"] == 2
    refused = runner._carry_out(PlannedTrial(scenario="no-such", number=0, seconds=1.0), tmp_path)
    assert "it ended with status 1" in refused


def test_what_the_machine_could_not_try_is_counted_and_said() -> None:
    skipped = Finding(promise="R18", tried=0, held=0, skipped="it takes four cores")
    tried = Finding(promise="R18", tried=3, held=3)
    results = [
        TrialResult(trial=f"one-{number}", scenario="one", seconds=1.0, findings=[asdict(finding)])
        for number, finding in enumerate((skipped, tried, skipped))
    ]
    # Of before a finding could be skipped.
    results[1].findings[0].pop("skipped")
    assert render(results, real_engine=())[0].endswith("held       3  skipped 2 (it takes four cores)")
