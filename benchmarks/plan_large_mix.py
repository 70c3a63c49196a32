"""Plans 60/30/10 over sources of 100, 10,000 and 1,000,000 rows: seconds, peak memory, counts, rows tokenized.

    PYTHONPATH=.:clients/python python -m benchmarks.plan_large_mix [--rows 1000000]

By examples it must stay under 30 s and 1 GiB. Writes only below a temporary directory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.planning_rows import PlanningSite, short_rows

SHARES = {1: 60.0, 2: 30.0, 3: 10.0}
MIXES: dict[str, dict[str, Any]] = {
    "examples, shrink": {"total": "1000"},
    "examples, repeat": {"total": "1000", "policy": "repeat", "max_repeats": 6},
    "tokens, shrink": {"unit": "tokens"},
    "tokens, 100,000": {"unit": "tokens", "total": "100000", "policy": "repeat", "max_repeats": 1000},
    "target tokens, shrink": {"unit": "target_tokens"},
}
MOST_SECONDS, MOST_BYTES = 30.0, 1024**3


def main() -> int:
    """Status 1 when a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the largest source")
    arguments = parser.parse_args()
    kept = True
    with tempfile.TemporaryDirectory() as directory:
        site = PlanningSite(Path(directory))
        sizes = {1: 100, 2: 10_000, 3: arguments.rows}
        references = [site.write(number, short_rows(size, seed=number)) for number, size in sizes.items()]
        print(f"{'mix':<24}{'seconds':>8}{'MiB':>6}  examples               realized %          rows tokenized")
        for name, mix in MIXES.items():
            # A cache of its own, so that each reads all three sources from the beginning.
            planned = site.plan(site.spec(references, SHARES, mix=mix), cache=f"cache {name}")
            rows = planned.plan["datasets"]
            unit = mix.get("unit", "examples")
            amounts = [int(row[f"num_{unit}"]) for row in rows]
            realized = [round(100 * amount / sum(amounts), 2) for amount in amounts]
            tokenized = sum(
                json.loads(path.read_text())["num_examples"]
                for path in (site.root / f"cache {name}" / "tokens").glob("*/shard.json")
            )
            print(
                f"{name:<24}{planned.seconds:>8.2f}{planned.peak_bytes / 2**20:>6.0f}  "
                f"{'/'.join(row['num_examples'] for row in rows):<22} {realized!s:<20} {tokenized}"
            )
            kept &= planned.seconds < MOST_SECONDS and planned.peak_bytes < MOST_BYTES
            kept &= all(abs(part - share) <= 0.5 for part, share in zip(realized, SHARES.values(), strict=True))
    print("within 30 s, 1 GiB and 0.5 points" if kept else "NOT within 30 s, 1 GiB and 0.5 points")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
