"""What is asked of the benchmarks by their options, and what a run of ours is read as."""

from __future__ import annotations

import pytest

from benchmarks import against_peer, cpu_rows, gpu_row
from benchmarks.peers.contest import run_name
from benchmarks.peers.ours import fold
from tunesmith.common.v1 import event_pb2


def test_a_row_without_its_field_is_said_not_to_be_offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(against_peer, "KNOWN_FIELDS", frozenset({"trainer"}))
    assert against_peer.main(["--row", "fp8", "--peer", "trl", "--models", "/nowhere"]) == 3
    assert "not offered (no compute)" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--warmup", "--turn-steps", "--alternations"])
def test_nothing_is_measured_without_steps(option: str) -> None:
    with pytest.raises(SystemExit) as raised:
        against_peer.main(["--row", "smoke", "--peer", "trl", "--models", "/nowhere", option, "0"])
    assert raised.value.code == 2


def test_by_default_there_are_three_alternations_after_seven_steps_or_more() -> None:
    chosen = against_peer.make_parser().parse_args(["--row", "dense", "--peer", "trl", "--models", "m"])
    assert chosen.alternations == 3
    assert chosen.warmup >= 7
    assert chosen.limit_seconds <= 480


def test_rows_with_a_script_of_their_own_are_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []

    def run_script(module: str, options: list[str]) -> int:
        calls.append((module, options))
        return 5

    monkeypatch.setattr(gpu_row, "run_script", run_script)
    assert gpu_row.main(["--row", "load", "--models", "m", "--out", "o.json"]) == 5
    ((module, options),) = calls
    assert module == "benchmarks.load_weights"
    assert options[-2:] == ["--out", "o.json"]
    assert options[options.index("--models") + 1] == "m"


def test_every_script_without_a_gpu_has_a_name() -> None:
    assert set(cpu_rows.SCRIPTS) == {"control-plane", "host-side", "planning"}


def test_runs_of_different_turns_do_not_share_a_directory() -> None:
    assert run_name("turn0", "tunesmith") != run_name("turn1", "tunesmith")


def test_a_runs_events_say_what_its_steps_were() -> None:
    events = [
        event_pb2.EventPayload(log=event_pb2.LogEvent(message="trained by the fast path: asked for")),
        event_pb2.EventPayload(step=event_pb2.StepEvent(step=2, num_tokens=90, loss=3.0)),
        event_pb2.EventPayload(step=event_pb2.StepEvent(step=1, num_tokens=100, loss=4.0)),
    ]
    facts = fold(events)
    assert facts["step_tokens"] == [100, 90]
    assert facts["losses"] == [4.0, 3.0]
    assert facts["trained_by"].startswith("trained by the fast path")
    assert facts["failure"] == ""
