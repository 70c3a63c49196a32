"""Writes the tables of docs/performance.md from the JSON files in benchmarks/results.

Text between a table's markers is replaced; everything else in the page is written by hand. A table without a result is
left empty, never filled with anything else. `--check` changes nothing and fails when page and files disagree.

    python -m benchmarks.render_results [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.result_tables import rest, training
from benchmarks.result_tables.markdown import Result

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
_MARKER = re.compile(r"(<!-- results: (?P<table>[a-z-]+) -->\n)(?P<old>.*?)(<!-- end -->\n)", re.DOTALL)

TABLES: Mapping[str, Callable[[Mapping[str, Result]], list[str]]] = {
    "goals": training.goal_table,
    "training": training.training_table,
    "ratios": training.ratio_table,
    "gradients": training.gradient_table,
    "profile": training.profile_table,
    "runs": training.run_table,
    "loading": rest.loading_table,
    "starting": rest.starting_table,
    "control-plane": rest.control_plane_table,
    "host": rest.host_table,
}


def read_results(directory: Path) -> dict[str, Result]:
    """Every result by its file's name without `.json`, in the names' order."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))}


def render(page: str, results: Mapping[str, Result]) -> str:
    """The page with its tables as the results have them. Raises KeyError for a marker of no known table."""

    def fill(match: re.Match[str]) -> str:
        lines = TABLES[match["table"]](results)
        body = "".join(f"{line}\n" for line in lines)
        return f"{match[1]}{body}{match[4]}"

    return _MARKER.sub(fill, page)


def main() -> int:
    """Status 1 when `--check` finds the page behind the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = render(before, read_results(RESULTS))
    if arguments.check:
        if before != after:
            print("docs/performance.md is not what benchmarks/results says; run python -m benchmarks.render_results")
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
