"""Proves the table: `python -m tests.faults.mutations [--only NAME] [--shard i/n]`. Status 1 when one is not proven."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.mutations.table import MUTATIONS
from tests.faults.mutations.trial import NotProven, check_green, check_red, copy_tree

_ROOT = Path(__file__).parents[3]


def main() -> int:
    """Prints a line a mutation, and at the end how many are proven."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutations", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutation; may be given again")
    parser.add_argument("--shard", default="1/1", metavar="i/n", help="every nth mutation, from the ith")
    arguments = parser.parse_args()
    index, _, count = arguments.shard.partition("/")
    unknown = set(arguments.only or ()) - {mutation.name for mutation in MUTATIONS}
    if unknown or not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        parser.error(
            f"no such mutation: {', '.join(sorted(unknown))}" if unknown else "--shard is i/n, from 1/n to n/n"
        )
    chosen = [mutation for mutation in MUTATIONS if not arguments.only or mutation.name in arguments.only]
    chosen = chosen[int(index) - 1 :: int(count)]
    started, unproven = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="tunesmith-mutations-") as directory:
        tree = Path(directory) / "tree"
        copy_tree(_ROOT, tree)
        try:
            check_green(tree, sorted({test for mutation in chosen for test in mutation.tests}))
        except NotProven as error:
            _say(error)
            return 1
        _say(f"all listed tests are green without a mutation ({time.monotonic() - started:.0f} s)")
        for mutation in chosen:
            try:
                outcome = check_red(tree, mutation)
            except NotProven as error:
                unproven += 1
                _say(f"NOT PROVEN  {mutation.promise:<4} {error}")
            else:
                _say(f"red  {mutation.promise:<4} {mutation.name}  ({outcome.seconds:.1f} s)")
    _say(f"{len(chosen) - unproven} of {len(chosen)} mutations are proven, in {time.monotonic() - started:.0f} s")
    return 1 if unproven or not chosen else 0


def _say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
