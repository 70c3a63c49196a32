"""`make bench-gpu`: one row by its name, whichever script measures it.

Rows of training are `benchmarks.against_peer`'s. Loading and starting have scripts of their own, which run their peers
themselves; for these `--peer` says nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks import against_peer
from benchmarks.cpu_rows import run_script
from benchmarks.peers.rows import ROWS
from benchmarks.peers.sides import PEERS

# Module and options of the rows that have a script of their own.
SCRIPTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "load": ("benchmarks.load_weights", ("--size", "3B", "--models", "{models}", "--cold", "--parity")),
    "start": ("benchmarks.start_up", ("--size", "3B", "--trainer", "fast")),
}


def main(arguments: list[str]) -> int:
    """The status of the script that measured the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=(*ROWS, *SCRIPTS), default="dense")
    parser.add_argument("--peer", choices=(*PEERS, "none"), default="trl")
    parser.add_argument("--peers", type=Path, help="a directory of installed peers, for their processes only")
    parser.add_argument("--models", type=Path, required=True, help="where random models are kept")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    if chosen.row in SCRIPTS:
        module, options = SCRIPTS[chosen.row]
        filled = [option.format(models=chosen.models) for option in options]
        return run_script(module, [*filled, "--out", str(chosen.out)])
    options_of_row = ["--row", chosen.row, "--peer", chosen.peer, "--models", str(chosen.models)]
    options_of_row += ["--out", str(chosen.out), "--ceiling", "--gradient-parity", "--profile", "tunesmith"]
    options_of_row += ["--peers", str(chosen.peers.resolve())] if chosen.peers else []
    return against_peer.main(options_of_row)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
