"""Every goal has a line: reached, missed by so much, or not measured; from runs on one H100 alone."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.peers.rows import ROWS
from benchmarks.peers.sides import PEERS, SILENT
from benchmarks.result_tables import goals, training

_GIB = 1024**3
_PARITY = {"relative_loss_difference": 2e-5, "gradient_error": 0.01, "reference_gradient_error": 0.02}


def _run(row: str, tokens_per_second: int, *, peak_gib: float = 20.0, **changes: Any) -> dict[str, Any]:
    ours = {
        "tokens_per_second": tokens_per_second,
        "step_milliseconds": 8192e3 / tokens_per_second,
        "peak_allocated_bytes": peak_gib * _GIB,
    }
    return {"row": row, "device": "NVIDIA H100", "sides": {"tunesmith": ours}, "ratios": {}, "parity": {}, **changes}


def _against(row: str, **ratios: float) -> dict[str, Any]:
    found = {"first_batch_loss": 12.0, "relative_difference": 1e-5}
    return _run(row, 30_000, ratios=ratios, parity=dict.fromkeys(ratios, found))


def _lines(results: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Cells behind a row's name."""
    lines: dict[str, list[list[str]]] = {}
    for line in goals.goal_table(results)[2:]:
        row, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        lines.setdefault(row, []).append(cells)
    return lines


def test_every_goal_has_a_line_measured_or_not() -> None:
    lines = _lines({"h100-dense": _run("dense", 32_000)})
    assert lines["dense"] == [
        ["at least 36,000 real tokens/s", "32,000 real tokens/s", "11.1% short", "h100-dense", "none"]
    ]
    assert sum(map(len, lines.values())) == len(goals.GOALS)
    others = [cells for row, found in lines.items() if row != "dense" for cells in found]
    assert all(cells[1:] == ["not measured", "", "", ""] for cells in others)


def test_goals_are_of_rows_and_peers_that_there_are() -> None:
    assert {*goals.RATES, *goals.PEAKS_GIB} <= set(ROWS)
    assert {peer for _, peer in goals.RATIOS if peer} <= set(PEERS)


@pytest.mark.parametrize(
    ("name", "device"), [("h200-dense", "NVIDIA H200"), ("h100-dense", "NVIDIA H200"), ("dense", "NVIDIA H100")]
)
def test_another_device_reaches_no_goal(name: str, device: str) -> None:
    assert goals.goal_table({name: {**_run("dense", 40_000), "device": device}}) == []


def test_all_goals_of_a_row_are_held_against_one_run() -> None:
    """A fast run with much memory and a slow one with little do not make a run that is both."""
    fast, small = _run("least-memory", 25_000, peak_gib=3.65), _run("least-memory", 19_000, peak_gib=3.3)
    rate, peak = _lines({"h100-fast": fast, "h100-small": small})["least-memory"]
    assert (rate[1:4], peak[1:4]) == (
        ["25,000 real tokens/s", "reached", "h100-fast"],
        ["3.65 GiB", "7.4% over", "h100-fast"],
    )
    both = _run("least-memory", 21_500, peak_gib=3.39)
    rate, peak = _lines({"h100-fast": fast, "h100-small": small, "h100-both": both})["least-memory"]
    assert (rate[2:4], peak[2:4]) == (["reached", "h100-both"], ["reached", "h100-both"])


def test_the_best_peer_counts_and_of_its_runs_the_worst() -> None:
    results = {
        "h100-trl": _against("dense", trl=1.9),
        "h100-transformers": _against("dense", transformers=1.1),
        "h100-silent": _against("dense", **{SILENT: 0.999}),
        "h100-unsloth": _against("dense", unsloth=1.26),
        "h100-unsloth-again": _against("dense", unsloth=1.24),
    }
    (cells,) = _lines(results)["dense, over the best peer"]
    assert cells == [
        "at least 1.25 times",
        "1.24 (unsloth)",
        "0.8% short",
        "h100-unsloth-again",
        "first loss 1e-05 from unsloth's",
    ]


def test_the_padded_default_has_a_goal_of_its_own() -> None:
    lines = _lines({"h100-mixed": _against("mixed", transformers=11.5)})
    assert lines["mixed, over transformers"][0][1:3] == ["11.50", "reached"]
    assert lines["mixed, over the best peer"][0][1] == "not measured"


def test_ratios_are_told_their_goals() -> None:
    table = training.ratio_table(
        {"h100-one": _against("mixed", unsloth=1.4), "h200-one": _against("mixed", unsloth=1.4)}
    )
    assert [line.split(" | ")[4] for line in table[2:]] == ["1.7", ""]
    assert goals.ratio_goal("mixed", "transformers") == 11.0
    assert goals.ratio_goal("dense", "transformers") is None
    assert goals.ratio_goal("dense", SILENT) is None


def test_events_cost_what_a_told_step_takes_longer() -> None:
    result = _run("dense", 36_000)

    def side(*turns: float) -> dict[str, Any]:
        return {**result["sides"]["tunesmith"], "intervals": [[(9, turn - 0.1), (10, turn + 0.1)] for turn in turns]}

    # The card was slower at the second alternation than at the first, which is nobody's cost.
    sides = {"tunesmith": side(200.4, 222.0), SILENT: side(200.0, 222.0)}
    (cells,) = _lines({"h100-silent": {**result, "sides": sides}})["events at every step, of a step's time"]
    assert cells[:3] == ["at most 0.2 %", "0.10 % (± 0.10, 2 alternations)", "reached"]
    sides["tunesmith"] = side(200.8, 222.888)
    (cells,) = _lines({"h100-silent": {**result, "sides": sides}})["events at every step, of a step's time"]
    assert cells[1:3] == ["0.40 % (± 0.00, 2 alternations)", "100.0% over"]
    (cells,) = _lines({"h100-small": {**result, "row": "small", "sides": sides}})[
        "events at every step, of a step's time"
    ]
    assert cells[1] == "not measured"


def test_the_latest_event_of_a_step_is_held_against_its_goal() -> None:
    result = _run("dense", 36_000)
    result["sides"]["tunesmith"]["told_after_milliseconds"] = [0.4, 0.5, 24.0]
    (cells,) = _lines({"h100-told": result})["a step's event, after its end"]
    assert cells[:3] == ["at most 20 ms", "24.0 ms (median 0.5, 3 steps)", "20.0% over"]


def test_training_every_weight_is_measured_by_a_script_of_its_own() -> None:
    row = {"row": "dense", "shape": "3B", "step_tokens": 8192, "recompute": "nothing"}
    standard = {**row, "memory": "standard", "tokens_per_second": 24_500, "peak_gib": 68.0, "parity": _PARITY}
    low = {**row, "memory": "low", "tokens_per_second": 11_000, "peak_gib": 17.85, "parity": {}}
    tiny = {**low, "shape": "tiny", "peak_gib": 1.0}
    lines = _lines({"h100-full": {"rows": [standard]}, "h100-low": {"rows": [low, tiny]}})
    said = "gradients 1.00% from float32's (plain path 2.00%)"
    assert lines["full"] == [["at least 24,000 real tokens/s", "24,500 real tokens/s", "reached", "h100-full", said]]
    assert lines["full-low"] == [["at most 17.5 GiB", "17.85 GiB", "2.0% over", "h100-low", "none"]]


def test_gradients_of_another_run_are_parity_and_the_worst_are_named() -> None:
    row = {"shape": "3B", "base": "nf4-kept", "row": "dense", "recompute": False, "tokens_per_second": 37_000}
    worse = {**row, "parity": {**_PARITY, "gradient_error": 0.03}}
    results: dict[str, Any] = {
        "h100-gradients": {"rows": [{**row, "parity": _PARITY}, worse, {**worse, "base": "nf4"}]},
        "h100-resident": _run("resident", 38_100),
        "h100-resident-mixed": _run("resident-mixed", 38_100),
    }
    lines = _lines(results)
    said = "gradients 3.00% from float32's (plain path 2.00%), h100-gradients"
    assert [lines[name][0][4] for name in ("resident", "resident-mixed")] == [said, "none"]
    own = {**results["h100-resident"], "parity": {"gradients": _PARITY}}
    (cells,) = _lines({**results, "h100-resident": own})["resident"]
    assert cells[4] == "gradients 1.00% from float32's (plain path 2.00%)"
    table = training.gradient_table(results)
    assert table[2] == "| h100-gradients | 3B | nf4-kept | dense | 2.0e-05 | 1.00% | 2.00% | 37,000 |"


def test_loading_starting_and_the_curve_are_of_their_own_scripts() -> None:
    def load(row: str, size: str, seconds: float, cold: bool = False) -> dict[str, Any]:
        return {"row": row, "size": size, "seconds": seconds, "cold": cold}

    loads = [
        load("files", "3B", 0.5),
        load("files", "3B", 0.9, cold=True),
        load("files", "8B", 1.8),
        load("copy", "3B", 0.2),
    ]
    started = {
        "h100-starting": {"rows": [{"case": case, "seconds": 2.0} for case in ("warm", "spare", "peer")]},
        "h100-curve": {"last_steps_relative_difference": -0.004, "model": "small", "steps": 200},
    }
    lines = _lines({"h100-load": {"device": "NVIDIA H100", "rows": loads, "parity_bytes_3B": 1000}, **started})
    said = "1,000 quantized bytes are the library's"
    assert lines["load 3B, files"][0][1:] == ["0.50 s", "reached", "h100-load", said]
    assert lines["load 8B, files"][0][1:] == ["1.80 s", "20.0% over", "h100-load", "none"]
    assert lines["load 3B, 4-bit copy"][0][1:] == ["0.20 s", "reached", "h100-load", said]
    slower = {"device": "NVIDIA H100", "rows": [load("files", "3B", 0.55), load("files", "8B", 1.9)]}
    lines = _lines({"h100-cold": slower, "h100-load": {"rows": loads, "parity_bytes_3B": 1000}, **started})
    assert lines["load 3B, files"][0][1:] == ["0.55 s", "reached", "h100-cold", f"{said}, h100-load"]
    assert lines["load 8B, files"][0][3:] == ["h100-cold", "none"]
    assert [lines[f"start, {case}"][0][2] for case in ("warm", "spare", "fresh")] == ["100.0% over", "reached", ""]
    (curve,) = lines["fp8's loss after 200 steps, apart"]
    assert curve[1:4] == ["0.40 % (small, 200 steps)", "reached", "h100-curve"]
