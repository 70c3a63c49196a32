"""The table of README: ours over what a team would take instead, each line of one run on one H100. Reads no file."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from benchmarks.peers.rows import ROWS
from benchmarks.peers.sides import OURS, SIDES, SILENT
from benchmarks.result_tables import findings, goals
from benchmarks.result_tables.markdown import Result, table

_LIBRARIES = "transformers, PEFT and bitsandbytes"
_STARTS: Mapping[str, str] = {
    "warm": "from a call to the first step, base in memory",
    "fresh": "the same, no process there",
}
_LOADS: Mapping[str, str] = {
    "files": "3B from files to 4 bits on the GPU",
    "copy": "the same, from the node's 4-bit copy",
}


def beside_table(results: Mapping[str, Result]) -> list[str]:
    """Of several runs of the same, the one that is worst for us."""
    counted = {name: result for name, result in results.items() if goals.counts(name, result)}
    rows = [*_training(counted), *_starts(counted), *_loads(counted)]
    return table(("", "beside", "times as fast", "of its memory"), rows)


def _training(results: Mapping[str, Result]) -> Iterator[tuple[str, ...]]:
    worst: dict[tuple[str, str], tuple[float, float]] = {}
    for _, result in findings.training(results):
        for peer, ratio in result["ratios"].items():
            ours, theirs = (result["sides"][side]["peak_allocated_bytes"] for side in (OURS, peer))
            key = result["row"], peer
            if peer != SILENT and ratio < worst.get(key, (float("inf"), 0.0))[0]:
                worst[key] = ratio, ours / theirs
    for (row, peer), (ratio, memory) in sorted(worst.items(), key=lambda one: (list(ROWS).index(one[0][0]), one[0][1])):
        yield ROWS[row].summary, SIDES[peer].summary, f"{ratio:.2f}", f"{memory:.2f}"


def _starts(results: Mapping[str, Result]) -> Iterator[tuple[str, ...]]:
    for case, what in _STARTS.items():
        ratios = [
            seconds["peer"] / seconds[case]
            for name, result in results.items()
            if {"peer", case} <= (seconds := _medians({name: result}, "case")).keys()
        ]
        if ratios:
            yield what, f"a process of {_LIBRARIES}, from its start", f"{min(ratios):.1f}", ""


def _loads(results: Mapping[str, Result]) -> Iterator[tuple[str, ...]]:
    for way, what in _LOADS.items():
        ratios = [
            seconds["library"] / seconds[way]
            for name, result in results.items()
            if {"library", way} <= (seconds := _medians({name: result}, "row", size="3B")).keys()
        ]
        if ratios:
            yield what, "`from_pretrained`, files in memory", f"{min(ratios):.1f}", ""


def _medians(results: Mapping[str, Result], by: str, **wanted: str) -> dict[str, float]:
    """Seconds of a script that writes rows, by what they are of; none of what was read from a cold disk."""
    found: dict[str, list[float]] = {}
    for _, one in findings.listed_rows(results):
        is_wanted = all(one.get(name) == value for name, value in wanted.items())
        if by in one and "seconds" in one and is_wanted and not one.get("cold"):
            found.setdefault(one[by], []).append(one["seconds"])
    return {name: statistics.median(values) for name, values in found.items()}
