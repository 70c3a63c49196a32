"""Ours against one peer on one row, alternating on the same device; prints a table and writes JSON.

    make bench-gpu ROW=dense PEER=trl
    python -m benchmarks.against_peer --row dense --peer trl --models DIR --out dense-trl.json

Each side is a process of its own, started once; turns alternate, after steps of warm-up, and whoever has no turn stands
still with its memory. Where one side needs nearly all of the device, each turn is a process of its own instead. The
model is of random weights, written below `--models` and kept there. The peers come from
`benchmarks/peers-requirements.txt` and are no dependency of the product.
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
from pathlib import Path
from typing import Any

from benchmarks.peers import rates
from benchmarks.peers.contest import contest, product_path, run_name
from benchmarks.peers.device_memory import DeviceMemory
from benchmarks.peers.rows import FULL, ROWS
from benchmarks.peers.sides import OURS, PEERS, SIDES
from benchmarks.peers.stream import Site, set_up
from benchmarks.peers.turns import SideFailed, python_command
from tunesmith.common.v1 import training_spec_pb2

# Steps beyond those of the turns, so that nobody's training ends by itself: a profile's, and what was begun ahead.
_SPARE_STEPS = 8
_STATUS_NOT_OFFERED = 3
KNOWN_FIELDS = frozenset(training_spec_pb2.Hyperparameters.DESCRIPTOR.fields_by_name)


def place_model(models: Path, shape: str) -> Path:
    """The directory of the random model of a shape; written when it is not there yet."""
    directory = models / "random" / shape
    if not directory.exists():
        # In a process of its own: weights are drawn on the device, whose memory is not this one's.
        options = ["--models", str(models), "--size", shape]
        environment = {**os.environ, "PYTHONPATH": product_path()}
        subprocess.run(python_command("benchmarks.random_models", options), check=True, env=environment)
    return directory


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The whole of one row. Raises SideFailed, and RuntimeError when our planner refuses it."""
    row = ROWS[arguments.row]
    names = [OURS] if arguments.peer == "none" else [OURS, arguments.peer]
    apart = arguments.apart or row.apart
    runs = [f"turn{number}" for number in range(arguments.alternations)] if apart else ["together"]
    ours = [run_name(run, name) for run in runs for name in names if SIDES[name].library == OURS]
    site = Site(root=scratch / "site", model_directory=place_model(arguments.models, row.shape))
    site.root.mkdir()
    out = arguments.work or scratch / "work"
    device = DeviceMemory().describe()
    num_steps = arguments.warmup + arguments.alternations * (arguments.turn_steps + 1) + _SPARE_STEPS
    settings = row.settings(num_steps, KNOWN_FIELDS)
    planned = set_up(row, site, runs=ours, settings=settings, device=device)
    sides = contest(arguments, names, site, out, apart)
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
            "hyperparameters": settings,
            "warmup_steps": arguments.warmup,
            "turn_steps": arguments.turn_steps,
            "alternations": arguments.alternations,
            "together": not apart,
            **planned,
        },
        "sides": {
            name: {"summary": SIDES[name].summary, **rates.summarize(side), **side} for name, side in sides.items()
        },
        "ratios": {},
        "parity": {},
    }
    for name in names[1:]:
        own, other = result["sides"][OURS], result["sides"][name]
        result["ratios"][name] = round(own["tokens_per_second"] / other["tokens_per_second"], 3)
        result["parity"][name] = rates.compare_losses(own, other)
    if arguments.ceiling:
        result["ceiling"] = _run_for_json("benchmarks.peers.ceiling", ["--row", arguments.row], out / "ceiling.json")
    if arguments.gradient_parity and row.gradient_base:
        options = ["--row", row.stream, "--steps", "2", "--warmup", "1", "--distinct", "1"]
        options += ["--shape", row.shape, "--tokens", str(row.tokens_per_step)]
        if row.gradient_base == FULL:
            module, options = "benchmarks.gpu_full_training", [*options, "--parity"]
        else:
            module, options = "benchmarks.gpu_training", [*options, "--base", row.gradient_base, "--path", "fast"]
        rows = _run_for_json(module, options, out / "gradients.json")["rows"]
        result["parity"]["gradients"] = rows[0]["parity"]
    return result


def _run_for_json(module: str, options: list[str], path: Path) -> Mapping[str, Any]:
    environment = {**os.environ, "PYTHONPATH": product_path()}
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
    parser.add_argument("--apart", action="store_true", help="a process and the whole device for each turn")
    parser.add_argument("--profile", nargs="*", choices=tuple(SIDES), help="sides to profile after the last turn")
    parser.add_argument("--ceiling", action="store_true", help="measure the frozen products alone too")
    parser.add_argument("--gradient-parity", action="store_true", help="compare gradients with the plain path's")
    parser.add_argument("--limit-seconds", type=float, default=480.0, help="of the sides' processes in all")
    parser.add_argument("--work", type=Path, help="where the sides' logs and results stay; else they are dropped")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    return parser


def main(options: list[str]) -> int:
    """Status 1 when a side failed, 3 when ours does not offer the row."""
    parser = make_parser()
    arguments = parser.parse_args(options)
    if arguments.warmup < 1 or arguments.turn_steps < 1 or arguments.alternations < 1:
        parser.error("at least one step of warm-up, one step a turn and one alternation")
    if missing := ROWS[arguments.row].missing_fields(KNOWN_FIELDS):
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
    sys.exit(main(sys.argv[1:]))
