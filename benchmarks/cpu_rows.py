"""`make bench`: every row that needs no GPU, one script after the other, each a process of its own.

Prints what each prints and writes one JSON: per script its status, seconds, what it printed, and its own JSON where it
writes one. A script whose figures are not reached says so by its status, which becomes this one's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Script:
    """`json_option`: the option by which it is told where to write its JSON; empty when it only prints."""

    summary: str
    module: str
    options: tuple[str, ...] = ()
    json_option: str = ""


SCRIPTS: Mapping[str, Script] = {
    "control-plane": Script(
        summary="RPCs, durable writes and events of the control service, beside an empty grpc.aio service",
        module="benchmarks.control_plane",
        json_option="--json",
    ),
    "host-side": Script(
        summary="tokenizing, packing and making steps, beside TRL's (where it is installed)",
        module="benchmarks.host_side",
        json_option="--json",
    ),
    "planning": Script(summary="plans over a million rows", module="benchmarks.plan_large_mix"),
}


def run_script(module: str, options: Sequence[str]) -> int:
    """A benchmark's module in a process of its own, its output where ours goes; its status."""
    return subprocess.run([sys.executable, "-m", module, *options], env=_environment(None), check=False).returncode


def run(name: str, peers: Path | None) -> dict[str, Any]:
    """One script to its end; its output is passed on as it comes. `peers` are importable for it."""
    script = SCRIPTS[name]
    with tempfile.TemporaryDirectory(prefix="cpu-rows-") as directory:
        document = Path(directory) / "rows.json"
        options = [*script.options, *([script.json_option, str(document)] if script.json_option else [])]
        began = time.monotonic()
        printed: list[str] = []
        with subprocess.Popen(
            [sys.executable, "-m", script.module, *options],
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(peers),
            cwd=ROOT,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                printed.append(line.rstrip("\n"))
        return {
            "summary": script.summary,
            "status": process.returncode,
            "seconds": round(time.monotonic() - began, 1),
            "printed": printed,
            "rows": json.loads(document.read_text(encoding="utf-8")) if document.exists() else None,
        }


def _environment(peers: Path | None) -> dict[str, str]:
    path = [str(ROOT), str(ROOT / "clients" / "python"), str(peers or ""), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}


def main() -> int:
    """Status 1 when a script's was not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--peers", type=Path, help="a directory of installed peers")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = {}
    for name in arguments.only:
        print(f"== {name}: {SCRIPTS[name].summary}", flush=True)
        results[name] = run(name, arguments.peers)
        if arguments.out:
            machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
            document = {"when": time.strftime("%Y-%m-%d", time.gmtime()), **machine, "scripts": results}
            arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    failed = [name for name, result in results.items() if result["status"]]
    print(f"{len(results)} scripts, not reached or failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
