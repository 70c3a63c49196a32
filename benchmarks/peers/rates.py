"""What the turns of a row come to: rates, their range, ratios, parity, and the table that is printed.

Arithmetic on what sides have told; starts and reads nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.sides import OURS

_GIB = 1024**3


def order_of_turns(names: Sequence[str], alternations: int) -> list[list[str]]:
    """Who runs when: each alternation has every side once, in turned-about order, so that none is always first."""
    return [list(names) if number % 2 == 0 else list(reversed(names)) for number in range(alternations)]


def summarize(side: Mapping[str, Any]) -> dict[str, Any]:
    """Real tokens a second over all counted steps: the median, the range, and each turn's own median.

    `side` has `intervals` ([turn][(step, milliseconds)]) and `step_tokens` (by step, padding not counted).
    """
    tokens = side["step_tokens"]
    turns = [
        [(tokens[step] / milliseconds * 1e3, milliseconds, tokens[step]) for step, milliseconds in turn]
        for turn in side["intervals"]
    ]
    steps = [step for turn in turns for step in turn]
    rates = [rate for rate, _, _ in steps]
    return {
        "tokens_per_second": round(statistics.median(rates)),
        "tokens_per_second_range": [round(min(rates)), round(max(rates))],
        "tokens_per_second_by_turn": [round(statistics.median(rate for rate, _, _ in turn)) for turn in turns],
        # Every token over all the time: what a long run would see.
        "tokens_per_second_overall": round(sum(step[2] for step in steps) / sum(step[1] for step in steps) * 1e3),
        "step_milliseconds": round(statistics.median(step[1] for step in steps), 2),
        "mean_step_tokens": round(statistics.mean(step[2] for step in steps)),
        "counted_steps": len(steps),
    }


def add_turn(side: Mapping[str, Any], turn: Mapping[str, Any]) -> dict[str, Any]:
    """A side's results with those of one more turn, made by a process of its own on the same steps."""
    if side["step_tokens"][: len(turn["step_tokens"])] != turn["step_tokens"][: len(side["step_tokens"])]:
        raise ValueError("the turns' steps are not the same")
    used = [one["device_used_bytes"] for one in (side, turn) if one["device_used_bytes"] is not None]
    return {
        **side,
        "intervals": [*side["intervals"], *turn["intervals"]],
        "peak_allocated_bytes": max(side["peak_allocated_bytes"], turn["peak_allocated_bytes"]),
        "device_used_bytes": max(used, default=None),
    }


def compare_losses(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Whether both trained the same thing: the loss of the first batch, and of later steps where these are the same."""
    expected, found = theirs["first_batch_loss"], ours["first_batch_loss"]
    parity: dict[str, Any] = {
        "first_batch_loss": found,
        "peer_first_batch_loss": expected,
        "relative_difference": abs(found - expected) / abs(expected),
    }
    counts = [one["step_tokens"] for one in (ours, theirs)]
    shared = min(map(len, counts))
    if counts[0][:shared] == counts[1][:shared] and len(set(counts[0][:shared])) == 1:
        # Steps of one size are rows of one length in the stream's order: nobody repacked them.
        differences = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=False)]
        parity["curve_steps"] = len(differences)
        parity["curve_mean_difference"] = sum(differences) / len(differences)
    return parity


def render_table(result: Mapping[str, Any]) -> str:
    """The row's table; everything in it is of one run."""
    lines = [
        f"row {result['row']}: {result['summary']}; {result['settings']['alternations']} alternations in one run"
        f" on {result['device']}, real tokens only",
        f"{'side':<22}{'tok/s':>8}{'range':>17}{'by turn':>24}{'ms/step':>9}{'alloc GiB':>11}{'device GiB':>12}"
        f"{'first loss':>12}",
    ]
    for name, side in result["sides"].items():
        low, high = side["tokens_per_second_range"]
        turns = " ".join(map(str, side["tokens_per_second_by_turn"]))
        used = side["device_used_bytes"]
        lines.append(
            f"{name:<22}{side['tokens_per_second']:>8}{f'{low}..{high}':>17}{turns:>24}"
            f"{side['step_milliseconds']:>9.1f}{side['peak_allocated_bytes'] / _GIB:>11.2f}"
            f"{'-' if used is None else f'{used / _GIB:.2f}':>12}{side['first_batch_loss']:>12.4f}"
        )
    for name, ratio in result["ratios"].items():
        parity = result["parity"][name]
        curve = ""
        if "curve_steps" in parity:
            curve = f", curve of {parity['curve_steps']} steps {parity['curve_mean_difference']:.4f} apart"
        lines.append(
            f"{OURS} is {ratio:.2f} x {name}; first batch's loss {parity['relative_difference']:.1e} apart{curve}"
        )
    if ceiling := result.get("ceiling"):
        share = result["sides"][OURS]["tokens_per_second"] / ceiling["tokens_per_second"] if ceiling else 0.0
        lines.append(
            f"frozen products alone: {ceiling['step_milliseconds']} ms, {ceiling['teraflops_per_second']} TFLOP/s;"
            f" {OURS} is at {share:.0%} of that rate"
        )
    return "\n".join(lines)
