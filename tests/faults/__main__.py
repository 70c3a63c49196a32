"""`python -m tests.faults --shard i/n`: the fault trials at their full counts, with one line a promise at the end.

Resumable: what was carried out under this commit is not run again. Status 1: a promise did not hold, or a trial could
not be carried out; 2: called wrongly.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.faults.plan import parse_shard, plan_trials, take_shard
from tests.faults.report import append_results, render
from tests.faults.runner import carry_out, run_trials
from tests.faults.scenarios import SCENARIOS

_ROOT = Path(__file__).resolve().parents[2]
RESULTS_FILE = Path(__file__).with_name("results.jsonl")
_UNKNOWN_COMMIT = "unknown"


def _commit() -> str:
    """Of the checkout; changes that are not committed have a name of their own."""
    asked = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=_ROOT, capture_output=True, check=False)
    if asked.returncode != 0:
        return _UNKNOWN_COMMIT
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!tests/faults/results.jsonl"],
        cwd=_ROOT,
        capture_output=True,
        check=False,
    )
    return asked.stdout.decode().strip() + ("-changed" if changed.stdout else "")


def _parser() -> argparse.ArgumentParser:
    cpus = os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--shard", default="1/1", metavar="i/n", help="which part of all trials (default 1/1: all)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this scenario; repeatable")
    parser.add_argument("--count", type=int, help="so many trials of each scenario instead of the full number")
    parser.add_argument("--at-once", type=int, default=max(1, cpus), help=f"trials at a time (default {cpus})")
    parser.add_argument("--commit", default="", help="name of what is tested, where git cannot tell")
    parser.add_argument("--work", type=Path, default=_ROOT / ".faults", help="directory of progress and evidence")
    parser.add_argument("--results", type=Path, default=RESULTS_FILE, help="file that results are appended to")
    parser.add_argument("--keep", action="store_true", help="keep the evidence of trials that went well, too")
    parser.add_argument("--list", action="store_true", help="only list the scenarios, with counts and seconds")
    return parser


def _run_shard(arguments: list[str]) -> int:
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.list:
        for one in SCENARIOS:
            seconds = one.num_trials * one.trial_seconds
            sys.stdout.write(
                f"{one.name:28} {one.num_trials:5} trials, about {seconds:6.0f} s  {','.join(one.promises)}\n"
            )
        return 0
    try:
        shard, num_shards = parse_shard(given.shard)
        trials = plan_trials(SCENARIOS, only=given.only, count=given.count)
    except (ValueError, KeyError) as error:
        parser.error(str(error))
    mine = take_shard(trials, shard=shard, num_shards=num_shards)
    commit = given.commit or _commit()
    results = run_trials(mine, work_directory=given.work / commit, num_at_once=given.at_once, keep=given.keep)
    append_results(given.results, results, commit=commit, shard=given.shard)
    real_engine = {scenario.name for scenario in SCENARIOS if scenario.real_engine}
    sys.stdout.writelines(f"{line}\n" for line in render(results, real_engine=real_engine))
    return 0 if all(result.is_good for result in results) else 1


def _run_trial(arguments: list[str]) -> int:
    """`trial NAME NUMBER DIRECTORY`, for the runner itself: one trial, in this process."""
    name, number, directory = arguments
    (scenario,) = [one for one in SCENARIOS if one.name == name]
    carry_out(scenario, number=int(number), directory=Path(directory))
    return 0


def main(arguments: list[str]) -> int:
    """Runs a shard; with `trial` in front, one trial."""
    return _run_trial(arguments[1:]) if arguments[:1] == ["trial"] else _run_shard(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
