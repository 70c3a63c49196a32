"""What turns come to: medians and ranges of real tokens, turned-about order, parity, and the table."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.peers import rates


def _side(milliseconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "intervals": [[(2, milliseconds), (3, milliseconds)], [(5, 2 * milliseconds), (6, milliseconds)]],
        "step_tokens": [8192] * 8,
        "losses": [4.0, 3.0, 2.0],
        "first_batch_loss": 4.0,
        "peak_allocated_bytes": 2 * 1024**3,
        "device_used_bytes": None,
        **changes,
    }


def test_each_alternation_turns_the_order_about() -> None:
    assert rates.order_of_turns(["a", "b"], 3) == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_rates_are_of_counted_steps() -> None:
    summary = rates.summarize(_side(100.0))
    assert summary["tokens_per_second"] == 81920
    assert summary["tokens_per_second_range"] == [40960, 81920]
    assert summary["tokens_per_second_by_turn"] == [81920, 61440]
    assert summary["tokens_per_second_overall"] == round(4 * 8192 / 0.5)
    assert summary["step_milliseconds"] == 100.0
    assert summary["counted_steps"] == 4


def test_a_step_is_counted_with_its_own_tokens() -> None:
    side = _side(1000.0, intervals=[[(1, 1000.0)], [(4, 1000.0)]], step_tokens=[1, 100, 1, 1, 300])
    assert rates.summarize(side)["tokens_per_second_range"] == [100, 300]
    assert rates.summarize(side)["mean_step_tokens"] == 200


def test_equal_steps_are_compared_as_a_curve() -> None:
    parity = rates.compare_losses(_side(1.0, losses=[4.0, 3.5]), _side(1.0, losses=[4.0, 3.0, 1.0]))
    assert parity["curve_steps"] == 2
    assert parity["curve_mean_difference"] == pytest.approx(0.25)


def test_repacked_steps_are_compared_by_the_first_batch_alone() -> None:
    parity = rates.compare_losses(_side(1.0, first_batch_loss=4.04), _side(1.0, step_tokens=[8192, 8000, 8100]))
    assert "curve_steps" not in parity
    assert parity["relative_difference"] == pytest.approx(0.01)


def test_a_turn_of_another_process_adds_up() -> None:
    first, second = _side(1.0), _side(2.0, peak_allocated_bytes=3 * 1024**3, device_used_bytes=7)
    both = rates.add_turn(first, second)
    assert len(both["intervals"]) == 4
    assert both["peak_allocated_bytes"] == 3 * 1024**3
    assert both["device_used_bytes"] == 7


def test_turns_over_other_steps_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="not the same"):
        rates.add_turn(_side(1.0), _side(1.0, step_tokens=[8192, 100]))


def test_the_table_names_what_shares_a_run() -> None:
    sides = {name: {**_side(ms), **rates.summarize(_side(ms))} for name, ms in (("tunesmith", 100.0), ("trl", 150.0))}
    table = rates.render_table(
        {
            "row": "dense",
            "summary": "a summary",
            "device": "a device",
            "settings": {"alternations": 2},
            "sides": sides,
            "ratios": {"trl": 1.5},
            "parity": {"trl": rates.compare_losses(sides["tunesmith"], sides["trl"])},
            "ceiling": {"step_milliseconds": 80.0, "teraflops_per_second": 700.0, "tokens_per_second": 102400},
        }
    )
    assert "2 alternations in one run on a device" in table
    assert "tunesmith is 1.50 x trl" in table
    assert "at 80% of that rate" in table
