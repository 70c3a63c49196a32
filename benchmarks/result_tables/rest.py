"""Tables of loading, starting, the control plane and the host's side, from what their own scripts wrote.

Each script's results are known by what its document holds. Reads no file.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.result_tables import findings
from benchmarks.result_tables.markdown import Result, table

# Of `benchmarks.step_parts`: the steps that others are held against, and the parts that are pieces of a step.
_AS_TRAINED = "as trained"
_PIECES = ("profile", "gemm", "attention", "elementwise")
_NO_FIGURES = ("part", "name", "row", "kernels")


def loading_table(results: Mapping[str, Result]) -> list[str]:
    """Seconds of each way to a quantized model on the device, page cache warm and cold."""
    rows = []
    for name, result in results.items():
        for (size, row, cold), seconds in _group(result, "size", "row", "cold").items():
            cache = "cold" if cold else "warm"
            rows.append((name, size, row, cache, *_spread(seconds), str(len(seconds))))
    heads = ("run", "shape", "way", "page cache", "median s", "lowest", "highest", "repeats")
    return table(heads, rows)


def starting_table(results: Mapping[str, Result]) -> list[str]:
    """Seconds from StartTraining to the first step's event at the client."""
    rows = []
    for name, result in results.items():
        for (case,), seconds in _group(result, "case").items():
            rows.append((name, case, *_spread(seconds), str(len(seconds))))
    return table(("run", "start", "median s", "lowest", "highest", "starts"), rows)


def tried_table(results: Mapping[str, Result]) -> list[str]:
    """Whole steps with one thing made another way, against the same steps as they are trained."""
    rows = []
    for name, result in results.items():
        steps = [part for part in result.get("parts", ()) if part.get("part") == "steps" and "change" in part]
        trained = {part["row"]: _median(part["ms"]) for part in steps if part["change"] == _AS_TRAINED}
        for part in steps:
            if part["row"] in trained:
                change = _median(part["ms"]) / trained[part["row"]] - 1
                said = "" if part["change"] == _AS_TRAINED else f"{change:+.1%}"
                rows.append((name, part["row"], part["change"], f"{_median(part['ms']):.1f}", said))
    return table(("run", "row", "what", "ms a step", "against as trained"), rows)


def parts_table(results: Mapping[str, Result]) -> list[str]:
    """What pieces of a step take alone, in milliseconds where nothing else is said."""
    rows = []
    for name, result in results.items():
        for part in result.get("parts", ()):
            if part.get("part") in _PIECES:
                figures = {key: value for key, value in part.items() if key not in _NO_FIGURES}
                what = ", ".join(str(part[key]) for key in ("row", "name") if key in part)
                said = "; ".join(f"{key} {value}" for key, value in _flatten(figures))
                rows.append((name, part["part"], what, said))
    return table(("run", "part", "of", "figures"), rows)


def full_table(results: Mapping[str, Result]) -> list[str]:
    """Training of every weight by the fast path."""
    rows = [
        (name, row["shape"], row["memory"], f"{row['tokens_per_second']:,}", f"{row['peak_gib']:.2f}")
        for name, row in findings.listed_rows(results)
        if "memory" in row
    ]
    return table(("run", "shape", "memory", "real tokens/s", "peak GiB"), rows)


def recorded_table(results: Mapping[str, Result]) -> list[str]:
    """Small passes played as recorded (CUDA graphs), beside the same passes launched kernel by kernel."""
    rows = []
    for name, result in results.items():
        found = {
            (part["shape"], part["tokens"], part["launched"]): part
            for part in result.get("parts", ())
            if "launched" in part
        }
        for (shape, tokens, is_launched), part in found.items():
            launched = found.get((shape, tokens, True))
            if not is_launched and launched is not None:
                gain = part["tokens_per_second"] / launched["tokens_per_second"]
                rates = (f"{one['tokens_per_second']:,}" for one in (launched, part))
                rows.append((name, shape, f"{tokens:,}", *rates, f"{gain:.2f}"))
    return table(("run", "shape", "tokens a pass", "launched, tokens/s", "recorded", "recorded / launched"), rows)


def curve_table(results: Mapping[str, Result]) -> list[str]:
    """Losses of the same steps on a real model, in bfloat16 and in 8 bits."""
    rows = []
    for name, result in results.items():
        if "last_steps_relative_difference" in result:
            exact, rounded = (f"{loss:.4f}" for loss in result["last_steps"])
            ends = (f"{100 * result['last_steps_relative_difference']:+.2f} %", f"{result['mean_difference']:.4f}")
            rows.append((name, result["model"], str(result["steps"]), exact, rounded, *ends))
    heads = ("run", "model", "steps", "last 20, bfloat16", "last 20, fp8", "difference", "mean difference of a step")
    return table(heads, rows)


def control_plane_table(results: Mapping[str, Result]) -> list[str]:
    """Every figure of every row of the control plane."""
    rows = []
    for name, result in results.items():
        found = result.get("scripts", {}).get("control-plane") or {}
        for row, figures in ((found.get("rows") or {}).get("rows") or {}).items():
            rows += [(name, row, what, value) for what, value in _flatten(figures)]
    return table(("run", "row", "figure", "value"), rows)


def host_table(results: Mapping[str, Result]) -> list[str]:
    """Packing and making steps, beside TRL's where it was installed."""
    rows = []
    for name, result in results.items():
        found = (result.get("scripts", {}).get("host-side") or {}).get("rows") or {}
        for way, figures in found.get("ways", {}).items():
            rows.append(
                (
                    name,
                    way,
                    f"{figures['fill']:.2%}",
                    f"{1e3 * figures['pack_seconds']:.0f}",
                    f"{figures['step_milliseconds']:.3f}",
                )
            )
    return table(("run", "side", "steps filled", "packing, ms", "making a step, ms"), rows)


def _median(figure: float | Sequence[float]) -> float:
    """Of a figure, or of those of several turns."""
    return float(figure) if isinstance(figure, float | int) else statistics.median(figure)


def _group(result: Result, *keys: str) -> dict[tuple[Any, ...], list[float]]:
    groups: dict[tuple[Any, ...], list[float]] = {}
    for _, row in findings.listed_rows({"": result}):
        if all(key in row for key in keys):
            groups.setdefault(tuple(row[key] for key in keys), []).append(float(row["seconds"]))
    return groups


def _spread(seconds: list[float]) -> tuple[str, str, str]:
    return f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}", f"{max(seconds):.3f}"


def _flatten(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}, ")
        else:
            yield f"{prefix}{name}", _short(value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
