"""Ours against one peer on one row, alternating on the same device; prints a table and writes JSON.

    make bench-gpu ROW=dense PEER=trl
    python -m benchmarks.against_peer --row dense --peer trl --models DIR --out dense-trl.json

Each side is a process of its own, started once. Turns alternate, the first of them after at least seven steps of
warm-up; whoever has no turn stands still with its memory. The model is of random weights, written below `--models` and
kept there. The peers come from `benchmarks/peers-requirements.txt` and are no dependency of the product.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.peers import attention_stand_in, rates, turns
from benchmarks.peers.rows import ROWS, Row
from benchmarks.peers.sides import OURS, PEERS, SIDES, Side
from benchmarks.peers.stream import Site, set_up
from benchmarks.peers.turns import MeasuredProcess, SideFailed, python_command
from tunesmith.common.v1 import training_spec_pb2

ROOT = Path(__file__).parents[1]
# Steps beyond those of the turns, so that nobody's training ends by itself: a profile's, and what was begun ahead.
_SPARE_STEPS = 8
_STATUS_NOT_OFFERED = 3


class DeviceMemory:
    """What the whole device holds, by NVML; nothing where there is none."""

    def __init__(self) -> None:
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
        except (ImportError, OSError) as error:
            print(f"no NVML: {error}", file=sys.stderr)
            return
        except Exception as error:  # noqa: BLE001 - NVML's errors are classes made at run time, without a common module
            print(f"no NVML: {error}", file=sys.stderr)
            return
        self._nvml = pynvml
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)

    def used_bytes(self) -> int | None:
        """Bytes in use, or None without NVML."""
        return None if self._handle is None else int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def describe(self) -> dict[str, Any]:
        """Name and total memory, as the planner is told of a device."""
        if self._handle is None:
            return {"type": "cpu", "name": "cpu", "total_memory_bytes": 0, "free_memory_bytes": 0}
        name = self._nvml.nvmlDeviceGetName(self._handle)
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return {
            "type": "cuda",
            "name": name.decode() if isinstance(name, bytes) else name,
            "total_memory_bytes": int(memory.total),
            "free_memory_bytes": int(memory.free),
        }


class Contest:
    """The sides of one row, from their start to their results."""

    def __init__(self, arguments: argparse.Namespace, names: list[str], site: Site, out: Path) -> None:
        self._arguments = arguments
        self._names = names
        self._site = site
        self._out = out
        self._memory = DeviceMemory()
        self._deadline = time.monotonic() + arguments.limit_seconds
        # What each side holds of the device, and the most it did.
        self._held: dict[str, int] = dict.fromkeys(names, 0)
        self._most: dict[str, int] = dict.fromkeys(names, 0)

    def run(self) -> dict[str, dict[str, Any]]:
        """Every side's results by name. Raises SideFailed."""
        with ExitStack() as stack:
            processes = {name: stack.enter_context(self._start(name)) for name in self._names}
            for process in processes.values():
                process.hear("imported", self._deadline)
            for name, process in processes.items():
                self._give_turn(name, process, "warm-up")
            for order in rates.order_of_turns(self._names, self._arguments.alternations):
                for name in order:
                    self._give_turn(name, processes[name], turns.GO)
            for name in self._arguments.profile or []:
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
        if name == OURS:
            options.append(f"--run={self._site.run_directory}")
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
        path = [_product_path()]
        if side.library in ("trl", "unsloth"):
            stand_in = self._out / "attention"
            if attention_stand_in.is_wanted() and not stand_in.exists():
                attention_stand_in.write(stand_in)
            path += [str(stand_in)]
            path += [str(self._arguments.peers)] if self._arguments.peers else []
        return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def _product_path() -> str:
    parts = [str(ROOT), str(ROOT / "clients" / "python"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, parts))


def missing_fields(row: Row) -> list[str]:
    """Fields of the contract that ours would need for the row, and does not have."""
    known = training_spec_pb2.Hyperparameters.DESCRIPTOR.fields_by_name
    return [name for name in row.needs_fields if name not in known]


def place_model(models: Path, shape: str) -> Path:
    """The directory of the random model of a shape; written when it is not there yet."""
    directory = models / "random" / shape
    if not directory.exists():
        # In a process of its own: weights are drawn on the device, whose memory is not this one's.
        options = ["--models", str(models), "--size", shape]
        environment = {**os.environ, "PYTHONPATH": _product_path()}
        subprocess.run(python_command("benchmarks.random_models", options), check=True, env=environment)
    return directory


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The whole of one row. Raises SideFailed, and RuntimeError when our planner refuses it."""
    row = ROWS[arguments.row]
    names = [OURS] if arguments.peer == "none" else [OURS, arguments.peer]
    site = Site(root=scratch / "site", model_directory=place_model(arguments.models, row.shape))
    site.root.mkdir()
    out = arguments.work or scratch / "work"
    out.mkdir(parents=True, exist_ok=True)
    device = DeviceMemory().describe()
    num_steps = arguments.warmup + arguments.alternations * (arguments.turn_steps + 1) + _SPARE_STEPS
    planned = set_up(row, site, num_steps=num_steps, device=device)
    sides = Contest(arguments, names, site, out).run()
    result: dict[str, Any] = {
        "row": arguments.row,
        "summary": row.summary,
        "device": device["name"],
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": sys.version.split()[0],
        "settings": {
            "shape": row.shape,
            "tokens_per_step": row.tokens_per_step,
            "training_type": row.training_type,
            "hyperparameters": row.settings(num_steps),
            "warmup_steps": arguments.warmup,
            "turn_steps": arguments.turn_steps,
            "alternations": arguments.alternations,
            **planned,
        },
        "sides": {
            name: {"summary": SIDES[name].summary, **rates.summarize(side), **side} for name, side in sides.items()
        },
        "ratios": {},
        "parity": {},
    }
    for name in names[1:]:
        ours, theirs = result["sides"][OURS], result["sides"][name]
        result["ratios"][name] = round(ours["tokens_per_second"] / theirs["tokens_per_second"], 3)
        result["parity"][name] = rates.compare_losses(ours, theirs)
    if arguments.ceiling:
        result["ceiling"] = _run_for_json("benchmarks.peers.ceiling", ["--row", arguments.row], out / "ceiling.json")
    if arguments.gradient_parity:
        options = ["--row", row.stream, "--path", "fast", "--steps", "1", "--warmup", "1", "--distinct", "1"]
        options += ["--shape", row.shape, "--tokens", str(row.tokens_per_step)]
        rows = _run_for_json("benchmarks.gpu_training", options, out / "gradients.json")["rows"]
        result["parity"]["gradients"] = rows[0]["parity"]
    return result


def _run_for_json(module: str, options: list[str], path: Path) -> Mapping[str, Any]:
    environment = {**os.environ, "PYTHONPATH": _product_path()}
    subprocess.run(python_command(module, [*options, "--out", str(path)]), check=True, env=environment)
    read: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def make_parser() -> argparse.ArgumentParser:
    """What may be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=tuple(ROWS), required=True)
    parser.add_argument("--peer", choices=(*PEERS, "none"), required=True)
    parser.add_argument("--models", type=Path, required=True, help="where random models are kept")
    parser.add_argument("--peers", type=Path, help="a directory of installed peers, for their processes only")
    parser.add_argument("--alternations", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=8, help="steps of each side before its first turn")
    parser.add_argument("--turn-steps", type=int, default=8, help="counted steps of a turn")
    parser.add_argument("--profile", nargs="*", choices=tuple(SIDES), help="sides to profile after the last turn")
    parser.add_argument("--ceiling", action="store_true", help="measure the frozen products alone too")
    parser.add_argument("--gradient-parity", action="store_true", help="compare gradients with the plain path's")
    parser.add_argument("--limit-seconds", type=float, default=480.0, help="of the sides' processes in all")
    parser.add_argument("--work", type=Path, help="where the sides' logs and results stay; else they are dropped")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    return parser


def main() -> int:
    """Status 1 when a side failed, 3 when ours does not offer the row."""
    parser = make_parser()
    arguments = parser.parse_args()
    if arguments.warmup < 1 or arguments.turn_steps < 1 or arguments.alternations < 1:
        parser.error("at least one step of warm-up, one step a turn and one alternation")
    if missing := missing_fields(ROWS[arguments.row]):
        print(f"row {arguments.row}: not offered (no {', '.join(missing)})")
        return _STATUS_NOT_OFFERED
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="against-peer-") as scratch:
        try:
            result = measure(arguments, Path(scratch))
        except (SideFailed, RuntimeError) as error:
            print(f"row {arguments.row}, {arguments.peer}: {error}", file=sys.stderr)
            return 1
    result["seconds"] = round(time.monotonic() - began, 1)
    print(rates.render_table(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
