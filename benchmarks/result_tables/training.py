"""Tables of the rows of training, from results that `benchmarks.against_peer` wrote. Reads no file."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.peers.kernel_profile import KINDS, OTHER
from benchmarks.result_tables import findings, goals
from benchmarks.result_tables.markdown import Result, table

_GIB = 1024**3


def training_table(results: Mapping[str, Result]) -> list[str]:
    """Each side of each run; lines of one run stand together and bear its name."""
    rows = []
    for name, result in findings.training(results):
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
    for name, result in findings.training(results):
        for peer, ratio in result["ratios"].items():
            parity = result["parity"][peer]
            curve = "repacked by the peer"
            if "curve_steps" in parity:
                curve = f"{parity['curve_mean_difference']:.4f} over {parity['curve_steps']} steps"
            goal = goals.ratio_goal(result["row"], peer) if goals.counts(name, result) else None
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
    """How far gradients are from float32's, ours and the plain path's, and the rate of the steps made beside."""
    rows = [
        (
            one.run,
            one.shape,
            f"{one.base}, recomputed" if one.recomputes else one.base,
            one.stream,
            f"{one.relative_loss_difference:.1e}",
            f"{one.error:.2%}",
            f"{one.reference_error:.2%}",
            "" if one.tokens_per_second is None else f"{one.tokens_per_second:,}",
        )
        for one in findings.gradients(results)
    ]
    heads = ("run", "shape", "base", "lengths", "loss", "our gradient's error", "the plain path's", "real tokens/s")
    return table(heads, rows)


def profile_table(results: Mapping[str, Result]) -> list[str]:
    """Milliseconds of a step by kind of kernel, beside the frozen products alone in the same run."""
    columns = [
        (f"{name}: {side}", figures["profile"], result.get("ceiling"))
        for name, result in findings.training(results)
        for side, figures in result["sides"].items()
        if figures["profile"]
    ]
    if not columns:
        return []
    rows = []
    for kind in (*(kind for kind, _ in KINDS), OTHER):
        # Empty where a run has none of the kind, or did not tell it from others yet.
        shares = [profile["kinds"].get(kind, {}).get("milliseconds") for _, profile, _ in columns]
        if any(shares):
            rows.append((kind, *("" if share is None else f"{share:.1f}" for share in shares)))
    rows.append(("sum of kernels", *(f"{profile['kernel_milliseconds']:.1f}" for _, profile, _ in columns)))
    rows.append(("wall, profiled", *(f"{profile['wall_milliseconds']:.1f}" for _, profile, _ in columns)))
    ceilings = [f"{ceiling['step_milliseconds']:.1f}" if ceiling else "" for _, _, ceiling in columns]
    rows.append(("frozen products alone, same run", *ceilings))
    return table(("milliseconds a step", *(name for name, _, _ in columns)), rows)


def run_table(results: Mapping[str, Result]) -> list[str]:
    """What each run was made on and with."""
    rows = []
    for name, result in findings.training(results):
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
