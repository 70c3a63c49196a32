"""What the control service can do on two cores without a GPU, beside an empty grpc.aio service (and MLflow).

    PYTHONPATH=.:clients/python python -m benchmarks.control_plane [--row NAME]... [--json FILE] [--seconds 3]

Rows (without `--row` all but `scale_full`, and `mlflow` where `--mlflow` says by whom); server, node and load
are processes of their own, peers alternate within a row, and every row says what processor time a thing took, which a
shared machine changes least:

    live_100x16, live_1000x64, live_5000x64   events a second x watchers, journal to decoded message, by age
    history_cold        64 watchers read a log from its start, from a service that has just been started
    unary_reads         GetJob, GetProject, ListProjects beside the empty service, and at half of each one's own rate
    durable_writes      CreateProject with request_id beside the empty service, and with 5 ms added to every commit
    crowd_2000          2,000 watchers of ten steps a second beside 200 calls a second and a probe of health
    watchers            memory and processor time of 500, 1,000 and 2,000 watchers
    scale               start-up, calls, 2,000 readers of a log and memory with no history, with 1,000 jobs of 100,000
                        events and with 10,000 jobs of 1,000,000
    scale_full          the same with 1,000,000 and 10,000,000 events (the file takes some GB and two minutes)
    queue               start-up, looking at a job and one that comes and goes, with 10 and with 10,000 jobs waiting
    mlflow              log_metric and log_batch over MLflow's REST (`--mlflow PYTHON`, an interpreter that has it)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from benchmarks import control_plane_events, control_plane_scale, control_plane_unary


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long and with what."""

    seconds: float
    mlflow: str


Row = Callable[[Path, Options], Coroutine[Any, Any, dict[str, Any]]]
ROWS: Mapping[str, Row] = {
    "live_100x16": lambda at, o: control_plane_events.live(at, rate=100, num_watchers=16, seconds=2 * o.seconds),
    "live_1000x64": lambda at, o: control_plane_events.live(at, rate=1000, num_watchers=64, seconds=2 * o.seconds),
    "live_5000x64": lambda at, o: control_plane_events.live(at, rate=5000, num_watchers=64, seconds=2 * o.seconds),
    "history_cold": lambda at, _: control_plane_events.history_cold(at, num_events=20_000, num_watchers=64),
    "unary_reads": lambda at, o: control_plane_unary.reads(at, seconds=o.seconds),
    "durable_writes": lambda at, o: control_plane_unary.writes(at, seconds=o.seconds),
    "crowd_2000": lambda at, o: control_plane_events.crowd_and_calls(at, num_watchers=2000, seconds=4 * o.seconds),
    "watchers": lambda at, o: control_plane_events.crowd(at, counts=(500, 1000, 2000), seconds=2 * o.seconds),
    "scale": lambda at, _: control_plane_scale.scale(at, sizes=((0, 0), (1_000, 100_000), (10_000, 1_000_000))),
    "scale_full": lambda at, _: control_plane_scale.scale(at, sizes=((0, 0), (1_000, 1_000_000), (10_000, 10_000_000))),
    "queue": lambda at, _: control_plane_scale.queue(at, counts=(10, 10_000)),
    "mlflow": lambda at, o: control_plane_unary.mlflow(at, python=o.mlflow or sys.executable),
}


def main() -> int:
    """Runs the rows, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", action="append", choices=sorted(ROWS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement; a row has several")
    parser.add_argument("--mlflow", default="", help="an interpreter that has mlflow")
    arguments = parser.parse_args()
    left_out = {"scale_full"} if arguments.mlflow else {"scale_full", "mlflow"}
    rows = arguments.row or [name for name in ROWS if name not in left_out]
    options = Options(seconds=arguments.seconds, mlflow=arguments.mlflow)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "grpc": grpc.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "rows": {},
    }
    for name in rows:
        with tempfile.TemporaryDirectory(prefix="control-plane-") as directory:
            result = asyncio.run(ROWS[name](Path(directory), options))
        found["rows"][name] = result
        sys.stdout.write(f"{name}\n" + "".join(f"    {line}\n" for line in _lines(result)))
        sys.stdout.flush()
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            value = "  ".join(f"{name} {_short(item)}" for name, item in value.items())
        lines.append(f"{key}: {_short(value)}")
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
