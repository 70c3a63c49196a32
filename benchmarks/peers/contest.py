"""Starts the sides of a row and gives them their turns; what they measured comes back by side.

Knows neither what a row trains nor what is made of the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.peers import attention_stand_in, rates, turns
from benchmarks.peers.device_memory import DeviceMemory
from benchmarks.peers.sides import OURS, SIDES, SILENT, Side
from benchmarks.peers.stream import Site
from benchmarks.peers.turns import MeasuredProcess, python_command

ROOT = Path(__file__).parents[2]


class Contest:
    """Sides of one row, from their start to their results. `run` names what of the site is theirs."""

    def __init__(self, arguments: argparse.Namespace, names: list[str], run: str, site: Site, out: Path) -> None:
        self._arguments = arguments
        self._names = names
        self._run = run
        self._site = site
        self._out = out / run
        self._out.mkdir(parents=True, exist_ok=True)
        self._memory = DeviceMemory()
        # What each side holds of the device, and the most it did.
        self._held: dict[str, int] = dict.fromkeys(names, 0)
        self._most: dict[str, int] = dict.fromkeys(names, 0)

    def carry_out(self, alternations: int, deadline: float) -> dict[str, dict[str, Any]]:
        """Every side's results by name. `deadline` is of time.monotonic. Raises SideFailed."""
        self._deadline = deadline
        before = self._memory.used_bytes()
        with ExitStack() as stack:
            processes = {name: stack.enter_context(self._start(name)) for name in self._names}
            for process in processes.values():
                process.hear("imported", self._deadline)
            for name in (name for name in self._names if SIDES[name].takes_memory_at_import):
                # There is at most one such side in a contest, so that all of it is its own.
                self._count(name, before)
            for name, process in processes.items():
                self._give_turn(name, process, "warm-up")
            for order in rates.order_of_turns(self._names, alternations):
                for name in order:
                    self._give_turn(name, processes[name], turns.GO)
            for name in set(self._arguments.profile or []) & set(self._names):
                self._give_turn(name, processes[name], turns.PROFILE)
            results = {}
            for name, process in processes.items():
                process.tell(turns.END)
                process.hear("done", self._deadline)
                results[name] = json.loads(self._result_path(name).read_text(encoding="utf-8"))
                results[name]["device_used_bytes"] = self._most[name] or None
            return results

    def _give_turn(self, name: str, process: MeasuredProcess, stage: str) -> None:
        before = self._memory.used_bytes()
        process.tell(turns.PROFILE if stage == turns.PROFILE else turns.GO)
        process.hear(stage, self._deadline)
        self._count(name, before)

    def _count(self, name: str, before: int | None) -> None:
        """What the device holds more than `before` is this side's, which alone was at work since."""
        after = self._memory.used_bytes()
        if before is not None and after is not None:
            self._held[name] += after - before
            self._most[name] = max(self._most[name], self._held[name])

    def _result_path(self, name: str) -> Path:
        return self._out / f"{name}.json"

    def _start(self, name: str) -> MeasuredProcess:
        arguments, side = self._arguments, SIDES[name]
        options = [
            f"--out={self._result_path(name)}",
            f"--warmup={arguments.warmup}",
            f"--turn-steps={arguments.turn_steps}",
        ]
        if side.library == OURS:
            options.append(f"--run={self._site.run_directory(run_name(self._run, name))}")
            options += ["--silent"] if name == SILENT else []
        else:
            options += [
                f"--side={name}",
                f"--row={arguments.row}",
                f"--model={self._site.model_directory}",
                f"--stream={self._site.stream_path}",
                f"--work={self._out / name}",
            ]
        command = python_command(side.module, options)
        return MeasuredProcess(command, log=self._out / f"{name}.log", environment=self._environment(side))

    def _environment(self, side: Side) -> dict[str, str]:
        path = [product_path()]
        if side.library in ("trl", "unsloth"):
            stand_in = self._out / "attention"
            if not side.as_installed:
                if attention_stand_in.is_wanted() and not stand_in.exists():
                    attention_stand_in.write(stand_in)
                path += [str(stand_in)]
            path += [str(self._arguments.peers)] if self._arguments.peers else []
        # Unsloth writes what it compiled into the working directory unless told otherwise, and counts its uses.
        unsloth = {"UNSLOTH_COMPILE_LOCATION": str(self._out / "compiled"), "UNSLOTH_DISABLE_STATISTICS": "1"}
        return {**os.environ, **unsloth, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def product_path() -> str:
    """PYTHONPATH of a process that runs our code from this tree."""
    parts = [str(ROOT), str(ROOT / "clients" / "python"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, parts))


def run_name(run: str, side: str) -> str:
    """What a run of one of our sides is called."""
    return f"{run}-{side}"


def contest(
    arguments: argparse.Namespace, names: list[str], site: Site, out: Path, apart: bool
) -> dict[str, dict[str, Any]]:
    """Results by side, all turns together. `apart`: each turn has its process, and the device, for itself."""
    deadline = time.monotonic() + arguments.limit_seconds
    if not apart:
        return Contest(arguments, names, "together", site, out).carry_out(arguments.alternations, deadline)
    results: dict[str, dict[str, Any]] = {}
    for number, order in enumerate(rates.order_of_turns(names, arguments.alternations)):
        for name in order:
            turn = Contest(arguments, [name], f"turn{number}", site, out / name).carry_out(1, deadline)[name]
            results[name] = rates.add_turn(results[name], turn) if name in results else turn
    return {name: results[name] for name in names}
