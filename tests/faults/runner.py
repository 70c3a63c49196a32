"""Runs trials, each in a process of its own, several at once; keeps what came of them, goes on where it was stopped.

Judges nothing: a promise held as often as its findings say. A trial that could not be carried out is no finding; it is
counted apart and makes the run fail.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.plan import PlannedTrial
from tests.faults.scenario import Finding, Scenario, Trial

_ROOT = Path(__file__).resolve().parents[2]
FINDINGS_FILE = "findings.json"
_OUTPUT_FILE = "output.log"
# So much longer than it should take, and a trial is hung.
_PATIENCE_FACTOR = 8.0
_PATIENCE_SECONDS = 240.0
_KILLS = frozenset({"kill", "failpoint"})
# A killed process that is not one of the product's.
_NOT_OURS = frozenset({"client"})


@dataclass(kw_only=True)
class TrialResult:
    """What came of one trial."""

    trial: str
    scenario: str
    seconds: float
    # Processes of the product that were killed in it.
    num_kills: int = 0
    # Of them engines and shims.
    num_engine_kills: int = 0
    findings: list[dict[str, Any]] = field(default_factory=list)
    # Why it could not be carried out; empty when it was.
    error: str = ""

    @property
    def is_good(self) -> bool:
        return not self.error and all(finding["held"] == finding["tried"] for finding in self.findings)


class Progress:
    """The results so far, in a file: a trial that was carried out is not run again, whatever it found."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def add(self, result: TrialResult) -> None:
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    def results(self) -> dict[str, TrialResult]:
        """The newest result of each trial."""
        lines = self._path.read_text(encoding="utf-8").splitlines()
        return {result.trial: result for result in (TrialResult(**json.loads(line)) for line in lines)}


def run_trials(
    trials: Sequence[PlannedTrial], *, work_directory: Path, num_at_once: int, keep: bool = False
) -> list[TrialResult]:
    """Runs those that were not carried out yet; gives the results of all. Says each on standard output."""
    progress = Progress(work_directory / "progress.jsonl")
    done = {name for name, result in progress.results().items() if not result.error}
    left = [trial for trial in trials if trial.name not in done]
    if len(left) < len(trials):
        sys.stdout.write(f"{len(trials) - len(left)} of {len(trials)} trials were carried out before\n")
    number = 0
    # Those that need the machine to themselves come last, one after the other.
    for alone, at_once in ((False, num_at_once), (True, 1)):
        with ThreadPoolExecutor(at_once) as pool:
            running = [
                pool.submit(_run_one, trial, work_directory, progress, keep) for trial in left if trial.alone is alone
            ]
            for future in running:
                number += 1
                _say(future.result(), number, len(left))
    results = progress.results()
    return [results[trial.name] for trial in trials]


def _say(result: TrialResult, number: int, total: int) -> None:
    how = "ok" if result.is_good else "NOT CARRIED OUT" if result.error else "A PROMISE DID NOT HOLD"
    sys.stdout.write(f"[{number}/{total}] {result.trial} {result.seconds:.0f} s, {result.num_kills} kills: {how}\n")
    violations = [text for finding in result.findings for text in finding["violations"][:5]]
    sys.stdout.writelines(f"    {line}\n" for line in [*violations, *result.error.splitlines()[-25:]])
    sys.stdout.flush()


def _run_one(trial: PlannedTrial, work_directory: Path, progress: Progress, keep: bool) -> TrialResult:
    directory = work_directory / "trials" / trial.name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    started = time.monotonic()
    error = _carry_out(trial, directory)
    result = TrialResult(trial=trial.name, scenario=trial.scenario, seconds=time.monotonic() - started, error=error)
    for file in directory.rglob("faults.jsonl"):
        faults = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        kills = [fault for fault in faults if fault["kind"] in _KILLS and fault["target"] not in _NOT_OURS]
        result.num_kills += len(kills)
        result.num_engine_kills += sum(fault["target"] in ("engine", "shim") for fault in kills)
    if not error:
        result.findings = json.loads((directory / FINDINGS_FILE).read_text(encoding="utf-8"))
    progress.add(result)
    if result.is_good and not keep:
        shutil.rmtree(directory, ignore_errors=True)
    return result


def _carry_out(trial: PlannedTrial, directory: Path) -> str:
    """Runs the trial in a process of its own; gives what went wrong."""
    command = [sys.executable, "-m", "tests.faults", "trial", trial.scenario, str(trial.number), str(directory)]
    limit_seconds = _PATIENCE_FACTOR * trial.seconds + _PATIENCE_SECONDS
    with (directory / _OUTPUT_FILE).open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=_ROOT)
        try:
            status = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            # It ends what it started.
            process.terminate()
            process.wait()
            return f"it did not end within {limit_seconds:.0f} s\n{_tail(directory)}"
    return "" if status == 0 else f"it ended with status {status}\n{_tail(directory)}"


def _tail(directory: Path) -> str:
    return (directory / _OUTPUT_FILE).read_text(encoding="utf-8", errors="replace")[-6000:]


def carry_out(scenario: Scenario, *, number: int, directory: Path) -> None:
    """One trial, in this process; writes its findings beside its evidence."""
    # Whoever gives up on it must not leave services behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    trial_directory = directory / "world"
    trial_directory.mkdir(parents=True, exist_ok=True)
    findings: list[Finding] = scenario.run(Trial(directory=trial_directory, seed=number))
    text = json.dumps([asdict(finding) for finding in findings])
    (directory / FINDINGS_FILE).write_text(text, encoding="utf-8")
