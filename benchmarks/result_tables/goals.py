"""What was to be reached on one H100, and how far each figure is from it, row by row; unmeasured rows are named too.

Only files of an H100 count, which are called `h100-*`. Where several measured a row of training, the best run counts,
and all goals of the row are held against that one; of everything else the worst. Reads no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from benchmarks.result_tables import findings
from benchmarks.result_tables.findings import Figure
from benchmarks.result_tables.markdown import Result, table

_FILES, _DEVICE = "h100-", "H100"
_TOKENS, _GIB, _SECONDS, _MILLISECONDS, _PERCENT = "real tokens/s", "GiB", "s", "ms", "%"
_SPELLINGS: Mapping[str, str] = {
    _TOKENS: ",.0f", _GIB: ".2f", _SECONDS: ".2f", _MILLISECONDS: ".1f", _PERCENT: ".2f", "": ".2f"
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`limit` in `unit` (empty: times), the least that counts where `is_floor`, else the most."""

    row: str
    limit: float
    unit: str
    find: Callable[[Mapping[str, Result]], Figure | None]
    is_floor: bool = False

    def spell(self) -> str:
        """As people say it."""
        unit = f" {self.unit}" if self.unit else " times"
        return f"{'at least' if self.is_floor else 'at most'} {self.limit:,g}{unit}"

    def judge(self, value: float) -> str:
        """Reached, or by which part of it not."""
        gap = value / self.limit - 1
        if self.is_floor:
            return "reached" if gap >= 0 else f"{-gap:.1%} short"
        return "reached" if gap <= 0 else f"{gap:.1%} over"


# Real tokens a second of ours, and GiB that its process has allocated at most.
RATES: Mapping[str, float] = {
    "dense": 36_000,
    "mixed": 36_000,
    "resident": 38_000,
    "resident-mixed": 38_000,
    "recompute": 25_000,
    "least-memory": 21_000,
    "8b": 16_500,
    "fp8": 50_000,
    "fp8-mixed": 46_000,
    "full": 24_000,
}
PEAKS_GIB: Mapping[str, float] = {"recompute": 8.0, "least-memory": 3.4, "full-low": 17.5}
# Ours over a peer in the same run; None is the strongest of those that were measured.
RATIOS: Mapping[tuple[str, str | None], float] = {
    ("dense", None): 1.25,
    ("mixed", None): 1.7,
    ("mixed", "transformers"): 11.0,
}
# From files in the page cache to a quantized model: by shape and way.
LOADING_SECONDS: Mapping[tuple[str, str], float] = {("3B", "files"): 0.6, ("8B", "files"): 1.5, ("3B", "copy"): 0.25}
STARTING_SECONDS: Mapping[str, float] = {"warm": 1.0, "spare": 2.5, "fresh": 6.5}
CURVE_PERCENT, EVENTS_PERCENT, TOLD_MILLISECONDS = 0.5, 0.2, 20.0


def _of_training() -> Iterator[Goal]:
    for row in dict.fromkeys((*RATES, *PEAKS_GIB)):
        best = partial(_best, row)
        if row in RATES:
            yield Goal(row=row, limit=RATES[row], unit=_TOKENS, is_floor=True, find=partial(_rate, best))
        if row in PEAKS_GIB:
            yield Goal(row=row, limit=PEAKS_GIB[row], unit=_GIB, find=partial(_peak, best))


def _best(row: str, results: Mapping[str, Result]) -> findings.Run | None:
    """The run that reached most of the row's goals, and of those the fastest."""

    def worth(run: findings.Run) -> tuple[int, float]:
        reached = run.tokens_per_second >= RATES.get(row, 0.0)
        return reached + (run.peak_gib <= PEAKS_GIB.get(row, float("inf"))), run.tokens_per_second

    return max(findings.training_runs(results, row), key=worth, default=None)


def _rate(best: Callable[[Mapping[str, Result]], findings.Run | None], results: Mapping[str, Result]) -> Figure | None:
    run = best(results)
    return None if run is None else Figure(value=run.tokens_per_second, run=run.name, parity=run.parity)


def _peak(best: Callable[[Mapping[str, Result]], findings.Run | None], results: Mapping[str, Result]) -> Figure | None:
    run = best(results)
    return None if run is None else Figure(value=run.peak_gib, run=run.name, parity=run.parity)


def _worst(
    find: Callable[[Mapping[str, Result]], Iterator[Figure]], lowest: bool, results: Mapping[str, Result]
) -> Figure | None:
    figures = list(find(results))
    return (min if lowest else max)(figures, key=lambda figure: figure.value, default=None)


def _of_the_rest() -> Iterator[Goal]:
    for (row, peer), limit in RATIOS.items():
        yield Goal(
            row=f"{row}, over {peer or 'the best peer'}",
            limit=limit,
            unit="",
            is_floor=True,
            find=partial(_worst, partial(findings.ratios, row=row, peer=peer), True),
        )
    below: list[tuple[str, float, str, Callable[[Mapping[str, Result]], Iterator[Figure]]]] = [
        ("fp8's loss after 200 steps, apart", CURVE_PERCENT, _PERCENT, findings.curves),
        ("events at every step, of a step's time", EVENTS_PERCENT, _PERCENT, findings.cost_of_events),
        ("a step's event, after its end", TOLD_MILLISECONDS, _MILLISECONDS, findings.delays_of_events),
    ]
    for (shape, way), seconds in LOADING_SECONDS.items():
        name = f"load {shape}, {'4-bit copy' if way == 'copy' else way}"
        below.append((name, seconds, _SECONDS, partial(findings.loads, shape=shape, way=way)))
    for case, seconds in STARTING_SECONDS.items():
        below.append((f"start, {case}", seconds, _SECONDS, partial(findings.starts, case=case)))
    for name, limit, unit, find in below:
        yield Goal(row=name, limit=limit, unit=unit, find=partial(_worst, find, False))


GOALS: tuple[Goal, ...] = (*_of_training(), *_of_the_rest())


def goal_table(results: Mapping[str, Result]) -> list[str]:
    """A line for every goal, as soon as anything was measured on the device that goals are of."""
    counted = {name: result for name, result in results.items() if counts(name, result)}
    if not counted:
        return []
    rows = []
    for goal in GOALS:
        figure = goal.find(counted)
        if figure is None:
            rows.append((goal.row, goal.spell(), "not measured", "", "", ""))
            continue
        measured = " ".join(filter(None, (f"{figure.value:{_SPELLINGS[goal.unit]}}", goal.unit, figure.note)))
        rows.append((goal.row, goal.spell(), measured, goal.judge(figure.value), figure.run, figure.parity))
    return table(("row", "goal", "measured", "", "run", "parity"), rows)


def counts(name: str, result: Result) -> bool:
    """Whether a file's figures are held against goals. Starts say no device: their file's name does."""
    return name.startswith(_FILES) and _DEVICE in result.get("device", _DEVICE)


def ratio_goal(row: str, peer: str) -> float | None:
    """What ours is to be over a peer of a row, if anything."""
    return RATIOS.get((row, peer), RATIOS.get((row, None)) if findings.is_strong(peer) else None)
