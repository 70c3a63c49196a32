"""`python -m tests.faults.simulation --seed N`: carries out one schedule and shows all that happened in it."""

from __future__ import annotations

import argparse
import sys
import time

from tests.faults.simulation.world import simulate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1, help="further seeds after it, without a trace")
    arguments = parser.parse_args()
    began = time.monotonic()
    num_broken = 0
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        outcome = simulate(seed, traced=arguments.count == 1)
        for line in outcome.trace:
            sys.stdout.write(line + "\n")
        if outcome.broken:
            num_broken += 1
            sys.stdout.write(f"seed {seed}: {outcome.broken}\n")
        elif arguments.count == 1:
            sys.stdout.write(f"seed {seed}: all held; {outcome}"[:300] + "\n")
    seconds = time.monotonic() - began
    sys.stdout.write(f"{arguments.count} schedules in {seconds:.1f} s, {num_broken} broken\n")
    return 1 if num_broken else 0


if __name__ == "__main__":
    sys.exit(main())
