"""Tables of the rows of training, from results that `benchmarks.against_peer` wrote. Reads no file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.peers.kernel_profile import KINDS, OTHER
from benchmarks.peers.sides import OURS
from benchmarks.result_tables.markdown import Result, table

_GIB = 1024**3

# The device that goals are of; another one's runs reach none and miss none.
GOAL_DEVICE = "H100"
# Real tokens a second that were set as the goal for ours, by row.
GOALS: Mapping[str, int] = {
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
# Peak memory that was set as the goal, GiB.
MEMORY_GOALS_GIB: Mapping[str, float] = {"recompute": 8.0, "least-memory": 3.4}
# At least so many times a peer's rate, in the same run.
RATIO_GOALS: Mapping[tuple[str, str], float] = {
    ("dense", "unsloth"): 1.25,
    ("mixed", "trl"): 1.7,
    ("mixed", "transformers"): 11.0,
}


def training_table(results: Mapping[str, Result]) -> list[str]:
    """Each side of each run; lines of one run stand together and bear its name."""
    rows = []
    for name, result in _training(results):
        for side, figures in result["sides"].items():
            low, high = figures["tokens_per_second_range"]
            used = figures["device_used_bytes"]
            rows.append(
                (
                    name,
                    result["device"],
                    result["row"],
                    side,
                    f"{figures['tokens_per_second']:,}",
                    f"{low:,} to {high:,}",
                    f"{figures['step_milliseconds']:.1f}",
                    f"{figures['peak_allocated_bytes'] / _GIB:.2f}",
                    "" if used is None else f"{used / _GIB:.2f}",
                    f"{figures['first_batch_loss']:.4f}",
                )
            )
    heads = (
        "run",
        "device",
        "row",
        "side",
        "real tokens/s",
        "range",
        "ms a step",
        "peak GiB",
        "device GiB",
        "first batch's loss",
    )
    return table(heads, rows)


def ratio_table(results: Mapping[str, Result]) -> list[str]:
    """Ours over each peer of the same run, with the parity that stands behind it."""
    rows = []
    for name, result in _training(results):
        for peer, ratio in result["ratios"].items():
            parity = result["parity"][peer]
            curve = "repacked by the peer"
            if "curve_steps" in parity:
                curve = f"{parity['curve_mean_difference']:.4f} over {parity['curve_steps']} steps"
            goal = RATIO_GOALS.get((result["row"], peer)) if GOAL_DEVICE in result["device"] else None
            rows.append(
                (
                    name,
                    result["row"],
                    peer,
                    f"{ratio:.2f}",
                    "" if goal is None else f"{goal:g}",
                    f"{parity['relative_difference']:.1e}",
                    curve,
                )
            )
    heads = ("run", "row", "peer", "ours / peer", "goal", "first loss, relative difference", "mean loss difference")
    return table(heads, rows)


def gradient_table(results: Mapping[str, Result]) -> list[str]:
    """How far gradients are from float32's, ours and the plain path's."""
    rows = [
        (
            name,
            result["row"],
            f"{gradients['relative_loss_difference']:.1e}",
            f"{gradients['gradient_error']:.2%}",
            f"{gradients['reference_gradient_error']:.2%}",
        )
        for name, result in _training(results)
        if (gradients := result["parity"].get("gradients"))
    ]
    return table(("run", "row", "loss", "our gradient's error", "the plain path's"), rows)


def goal_table(results: Mapping[str, Result]) -> list[str]:
    """The best measured run of each row against its goal: reached, or by how much not."""
    best: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, result in _training(results):
        ours, row = result["sides"].get(OURS), result["row"]
        if (
            ours
            and GOAL_DEVICE in result["device"]
            and (row not in best or ours["tokens_per_second"] > best[row][1]["tokens_per_second"])
        ):
            best[row] = name, ours
    rows = []
    for row, goal in GOALS.items():
        if row not in best:
            continue
        name, ours = best[row]
        gap = ours["tokens_per_second"] / goal - 1
        memory = ""
        if row in MEMORY_GOALS_GIB:
            memory = f"{ours['peak_allocated_bytes'] / _GIB:.2f} of {MEMORY_GOALS_GIB[row]:g} GiB"
        said = "reached" if gap >= 0 else f"{-gap:.1%} short"
        rows.append((row, f"{goal:,}", f"{ours['tokens_per_second']:,}", said, memory, name))
    return table(("row", "goal", "ours, real tokens/s", "", "memory", "run"), rows)


def profile_table(results: Mapping[str, Result]) -> list[str]:
    """Milliseconds of a step by kind of kernel, beside the frozen products alone in the same run."""
    columns = [
        (f"{name}: {side}", figures["profile"], result.get("ceiling"))
        for name, result in _training(results)
        for side, figures in result["sides"].items()
        if figures["profile"]
    ]
    if not columns:
        return []
    rows = []
    for kind in (*(kind for kind, _ in KINDS), OTHER):
        shares = [profile["kinds"].get(kind, {}).get("milliseconds", 0.0) for _, profile, _ in columns]
        if any(shares):
            rows.append((kind, *(f"{share:.1f}" for share in shares)))
    rows.append(("sum of kernels", *(f"{profile['kernel_milliseconds']:.1f}" for _, profile, _ in columns)))
    rows.append(("wall, profiled", *(f"{profile['wall_milliseconds']:.1f}" for _, profile, _ in columns)))
    ceilings = [f"{ceiling['step_milliseconds']:.1f}" if ceiling else "" for _, _, ceiling in columns]
    rows.append(("frozen products alone, same run", *ceilings))
    return table(("milliseconds a step", *(name for name, _, _ in columns)), rows)


def run_table(results: Mapping[str, Result]) -> list[str]:
    """What each run was made on and with."""
    rows = []
    for name, result in _training(results):
        settings = result["settings"]
        versions: dict[str, str] = {}
        for figures in result["sides"].values():
            versions |= figures["versions"]
        rows.append(
            (
                name,
                result["when"],
                result["device"],
                f"{settings['alternations']} x {settings['turn_steps']} after {settings['warmup_steps']}",
                "one process a side" if settings["together"] else "one process a turn",
                ", ".join(f"{library} {version}" for library, version in sorted(versions.items())),
            )
        )
    return table(("run", "day", "device", "counted steps", "processes", "versions"), rows)


def _training(results: Mapping[str, Result]) -> Iterable[tuple[str, Result]]:
    return [(name, result) for name, result in results.items() if "sides" in result and "row" in result]
