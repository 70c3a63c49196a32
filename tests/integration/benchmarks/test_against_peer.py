"""One row from its dataset to its JSON, on the CPU with a tiny model: ours through the engine, as it is measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import against_peer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_row_is_measured_through_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "row.json"
    options = ["--row", "smoke-mixed", "--peer", "none", "--models", str(tmp_path / "models"), "--out", str(out)]
    options += ["--warmup", "1", "--turn-steps", "2", "--alternations", "2", "--limit-seconds", "300"]
    options += ["--work", str(tmp_path / "work")]
    assert against_peer.main(options) == 0, capsys.readouterr().err

    result = json.loads(out.read_text())
    ours = result["sides"]["tunesmith"]
    assert ours["counted_steps"] == 4
    # Step 0 is warm-up; steps 1 and 4 follow a stand-still.
    assert [[step for step, _ in turn] for turn in ours["intervals"]] == [[2, 3], [5, 6]]
    # Of each turn's last steps nobody asks when they were told.
    assert len(ours["told_after_milliseconds"]) == 2
    assert all(milliseconds > 0 for milliseconds in ours["told_after_milliseconds"])
    assert all(0 < tokens <= 4096 for tokens in ours["step_tokens"])
    # A model that has learned nothing, over 512 tokens.
    assert ours["first_batch_loss"] == pytest.approx(math.log(512), abs=0.1)
    assert ours["trained_by"].startswith("trained by ")
    assert ours["versions"]["torch"]
    assert result["settings"]["longest_sequence_tokens"] <= 2048
    assert "row smoke-mixed" in capsys.readouterr().out
