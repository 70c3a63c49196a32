"""Figures that goals are about, and where in results they stand: in which script's document, under which names.

Judges nothing; reads no file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.rows import ROWS
from benchmarks.peers.sides import OURS, SILENT
from benchmarks.result_tables.markdown import Result

_GIB = 1024**3
_PADDED = "transformers"
# Where there is no proof that the right thing was done.
_NONE = "none"
# Of `benchmarks.gpu_full_training`, by how much memory may be used.
_FULL_ROWS: Mapping[str, str] = {"full": "standard", "full-low": "low"}
_FULL_SHAPE, _FULL_TOKENS = "3B", 8192
# What `benchmarks.gpu_training` calls a row's base, where `benchmarks.against_peer` does not ask it for the row.
_BASES: Mapping[str, str] = {"8b": "nf4", "recompute": "nf4", "fp8": "fp8", "fp8-mixed": "fp8"}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """`parity`: what says that the right thing was done; empty where it needs no proof. `note` is said of the value."""

    value: float
    run: str
    parity: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of a row, ours."""

    name: str
    tokens_per_second: float
    peak_gib: float
    parity: str


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Against float32's, of one shape, base and stream; errors are parts of the norm."""

    run: str
    shape: str
    base: str
    stream: str
    recomputes: bool
    relative_loss_difference: float
    error: float
    reference_error: float
    tokens_per_second: float | None = None

    def spell(self) -> str:
        return f"gradients {self.error:.2%} from float32's (plain path {self.reference_error:.2%})"


def training(results: Mapping[str, Result]) -> Iterator[tuple[str, Result]]:
    """What `benchmarks.against_peer` wrote."""
    return ((name, result) for name, result in results.items() if "sides" in result and "row" in result)


def training_runs(results: Mapping[str, Result], row: str) -> list[Run]:
    """Of a row of `benchmarks.peers.rows`, whichever script trained it."""
    runs = []
    for name, result in training(results):
        if result["row"] == row and (ours := result["sides"].get(OURS)):
            peak_gib = ours["peak_allocated_bytes"] / _GIB
            parity = _parity(name, result, results)
            runs.append(Run(name=name, tokens_per_second=ours["tokens_per_second"], peak_gib=peak_gib, parity=parity))
    for name, one in listed_rows(results):
        is_it = "memory" in one and one["memory"] == _FULL_ROWS.get(row)
        if is_it and one["shape"] == _FULL_SHAPE and one["step_tokens"] == _FULL_TOKENS:
            parity = _of_row(name, one, base="full").spell() if one["parity"] else _NONE
            rate, peak_gib = one["tokens_per_second"], one["peak_gib"]
            runs.append(Run(name=name, tokens_per_second=rate, peak_gib=peak_gib, parity=parity))
    return runs


def gradients(results: Mapping[str, Result]) -> Iterator[Gradients]:
    """Every comparison of gradients that was made, beside a row or alone."""
    for name, result in training(results):
        if found := result["parity"].get("gradients"):
            row = ROWS[result["row"]]
            beside = {"shape": row.shape, "row": row.stream, "parity": found}
            yield _of_row(name, beside, base=row.gradient_base)
    for name, one in listed_rows(results):
        if one.get("parity") and "gradient_error" in one["parity"]:
            yield _of_row(name, one, base=one.get("base", "full"))


def ratios(results: Mapping[str, Result], *, row: str, peer: str | None) -> Iterator[Figure]:
    """Ours over `peer`, or over each of those that pack, in the same run."""
    for name, result in training(results):
        for other, ratio in result["ratios"].items():
            if result["row"] == row and (is_strong(other) if peer is None else other == peer):
                parity = _of_losses(other, result["parity"][other])
                yield Figure(value=ratio, run=name, parity=parity, note=f"({other})" if peer is None else "")


def is_strong(peer: str) -> bool:
    """Whether it may be the best of the peers: neither the padded default nor ours with one thing left out."""
    return peer not in (_PADDED, SILENT)


def curves(results: Mapping[str, Result]) -> Iterator[Figure]:
    """How far the loss of 8 bits is from bfloat16's at the end, percent, up or down."""
    for name, result in results.items():
        if "last_steps_relative_difference" in result:
            apart = abs(100 * result["last_steps_relative_difference"])
            yield Figure(value=apart, run=name, note=f"({result['model']}, {result['steps']} steps)")


def cost_of_events(results: Mapping[str, Result]) -> Iterator[Figure]:
    """What a step takes longer because it is told, percent, with the standard error; below zero where that is larger.

    Turns of the same alternation are compared, by their mean step: a card is faster at one time than at another.
    """
    for name, result in training(results):
        sides = result["sides"]
        if result["row"] == "dense" and OURS in sides and SILENT in sides:
            told, silent = (
                [statistics.mean(milliseconds for _, milliseconds in turn) for turn in sides[side]["intervals"]]
                for side in (OURS, SILENT)
            )
            costs = [100 * (ours / theirs - 1) for ours, theirs in zip(told, silent, strict=True)]
            error = statistics.stdev(costs) / math.sqrt(len(costs)) if len(costs) > 1 else math.inf
            yield Figure(value=statistics.mean(costs), run=name, note=f"(± {error:.2f}, {len(costs)} alternations)")


def delays_of_events(results: Mapping[str, Result]) -> Iterator[Figure]:
    """The longest time from a step's end on the device until its event was in the journal, milliseconds."""
    for name, result in training(results):
        found = result["sides"][OURS].get("told_after_milliseconds")
        if found:
            median = statistics.median(found)
            yield Figure(value=max(found), run=name, note=f"(median {median:.1f}, {len(found)} steps)")


def loads(results: Mapping[str, Result], *, shape: str, way: str) -> Iterator[Figure]:
    """Median seconds with the files in the page cache."""
    for name, result in results.items():
        found = [
            one["seconds"]
            for _, one in listed_rows({name: result})
            if one.get("size") == shape and one.get("row") == way and not one.get("cold")
        ]
        if found:
            yield Figure(value=statistics.median(found), run=name, parity=_of_bytes(name, results, shape=shape))


def _of_bytes(name: str, results: Mapping[str, Result], *, shape: str) -> str:
    """Of the run itself; else of another one that loaded the same shape and compared."""
    compared = {run: result.get(f"parity_bytes_{shape}") for run, result in results.items()}
    run = name if compared[name] else next((run for run, num_bytes in compared.items() if num_bytes), None)
    if run is None:
        return _NONE
    text = f"{compared[run]:,} quantized bytes are the library's"
    return text if run == name else f"{text}, {run}"


def starts(results: Mapping[str, Result], *, case: str) -> Iterator[Figure]:
    """Median seconds from StartTraining to the first step's event at the client."""
    for name, result in results.items():
        found = [one["seconds"] for _, one in listed_rows({name: result}) if one.get("case") == case]
        if found:
            yield Figure(value=statistics.median(found), run=name)


def listed_rows(results: Mapping[str, Result]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of the scripts that write a list of them."""
    for name, result in results.items():
        rows = result.get("rows")
        for row in rows if isinstance(rows, list) else ():
            yield name, row


def _parity(name: str, result: Result, results: Mapping[str, Result]) -> str:
    """Of the run itself; else gradients of the same row that were compared in another run, the worst of these."""
    for peer, found in result["parity"].items():
        if peer != SILENT and "first_batch_loss" in found:
            return _of_losses(peer, found)
    row = ROWS[result["row"]]
    base, recomputes = row.gradient_base or _BASES.get(result["row"], ""), result["row"] == "recompute"
    wanted = (row.shape, base, row.stream, recomputes)
    fitting = [one for one in gradients(results) if (one.shape, one.base, one.stream, one.recomputes) == wanted]
    worst = max(fitting, key=lambda one: (one.run == name, one.error), default=None)
    if worst is None:
        return _NONE
    return worst.spell() if worst.run == name else f"{worst.spell()}, {worst.run}"


def _of_losses(peer: str, found: Mapping[str, Any]) -> str:
    return f"first loss {found['relative_difference']:.0e} from {peer}'s"


def _of_row(run: str, row: Mapping[str, Any], *, base: str) -> Gradients:
    parity = row["parity"]
    return Gradients(
        run=run,
        shape=row["shape"],
        base=base,
        stream=row["row"],
        recomputes=row.get("recompute") is True,
        relative_loss_difference=parity["relative_loss_difference"],
        error=parity["gradient_error"],
        reference_error=parity["reference_gradient_error"],
        tokens_per_second=row.get("tokens_per_second"),
    )
