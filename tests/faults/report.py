"""What trials amount to: one line a promise, one record a scenario and promise, and how many kills there were."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.runner import TrialResult


@dataclass(kw_only=True)
class PromiseCount:
    """One promise over any number of trials."""

    tried: int = 0
    held: int = 0
    worst: float | None = None
    unit: str = ""
    what: str = ""
    # Findings of machines that could not try it, and why the newest could not.
    skipped: int = 0
    skipped_why: str = ""

    def add(self, finding: dict[str, Any]) -> None:
        self.tried += finding["tried"]
        self.held += finding["held"]
        # Results of before there was such a thing have none.
        if why := finding.get("skipped"):
            self.skipped, self.skipped_why = self.skipped + 1, why
        worst = finding["worst"]
        if worst is not None and (self.worst is None or worst > self.worst):
            self.worst, self.unit, self.what = worst, finding["unit"], finding["what"]


def count(results: Iterable[TrialResult], key: str) -> dict[tuple[str, str], PromiseCount]:
    """By (scenario, promise); with `key` "promise", by ("", promise)."""
    counts: dict[tuple[str, str], PromiseCount] = {}
    for result in results:
        for finding in result.findings:
            scenario = result.scenario if key == "scenario" else ""
            counts.setdefault((scenario, finding["promise"]), PromiseCount()).add(finding)
    return dict(sorted(counts.items(), key=lambda item: (item[0][0], _number(item[0][1]))))


def _number(promise: str) -> tuple[int, str]:
    digits = promise.removeprefix("R")
    return (int(digits), "") if digits.isdigit() else (1000, promise)


def render(results: Sequence[TrialResult], *, real_engine: Collection[str]) -> list[str]:
    """One line a promise, then the kills; `real_engine` names the scenarios whose engine trains a real model."""
    lines = []
    for (_, promise), counted in count(results, "promise").items():
        line = f"{promise:4} tried {counted.tried:7}  held {counted.held:7}"
        if counted.worst is not None:
            line += f"  worst {counted.worst:.2f} {counted.unit} ({counted.what})"
        if counted.skipped:
            line += f"  skipped {counted.skipped} ({counted.skipped_why})"
        lines.append(line + ("" if counted.held == counted.tried else "  BROKEN"))
    kills = sum(result.num_kills for result in results)
    real = sum(result.num_engine_kills for result in results if result.scenario in real_engine)
    failed = sum(bool(result.error) for result in results)
    lines.append(f"kills {kills}, of which {real} hit a real engine that trains or its shim")
    lines.append(f"trials {len(results)}, not carried out {failed}")
    return lines


def append_results(path: Path, results: Sequence[TrialResult], *, commit: str, shard: str) -> None:
    """Adds the run to the results file: a line for each scenario and promise, and one for its kills."""
    head = {"commit": commit, "shard": shard, "machine": {"cpus": os.cpu_count()}}
    records: list[dict[str, Any]] = [
        {**head, "scenario": scenario, "promise": promise, **vars(counted)}
        for (scenario, promise), counted in count(results, "scenario").items()
    ]
    for scenario in sorted({result.scenario for result in results}):
        own = [result for result in results if result.scenario == scenario]
        records.append(
            {
                **head,
                "scenario": scenario,
                "trials": len(own),
                "not_carried_out": sum(bool(result.error) for result in own),
                "kills": sum(result.num_kills for result in own),
                "engine_kills": sum(result.num_engine_kills for result in own),
            }
        )
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
