"""How long a service's start took: less what the trial stopped it for, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.driver.services import Start

_START = Start(pid=9, began=100.0, served=121.0)


def _fault(at: float, kind: str, pid: int = 9) -> dict[str, Any]:
    return {"at": at, "kind": kind, "target": "gpu", "pid": pid}


@pytest.mark.parametrize(
    ("faults", "seconds"),
    [
        pytest.param([], 21.0, id="left alone"),
        pytest.param([_fault(100.5, "stop"), _fault(120.0, "continue")], 1.5, id="stopped on its way back"),
        pytest.param([_fault(100.5, "stop", 8), _fault(120.0, "continue", 8)], 21.0, id="another was stopped"),
        pytest.param([_fault(90.0, "stop"), _fault(95.0, "continue")], 21.0, id="stopped before it was this one"),
        pytest.param([_fault(122.0, "stop"), _fault(140.0, "continue")], 21.0, id="stopped once it served"),
        pytest.param([_fault(120.5, "stop"), _fault(140.0, "continue")], 20.5, id="stopped as it came to serve"),
        pytest.param(
            [_fault(101.0, "stop"), _fault(102.0, "continue"), _fault(103.0, "stop"), _fault(105.0, "continue")],
            18.0,
            id="stopped twice",
        ),
        pytest.param([_fault(100.5, "kill", 8), _fault(101.0, "continue")], 21.0, id="continued without a stop"),
    ],
)
def test_a_start_is_not_charged_for_what_the_trial_stopped(faults: list[dict[str, Any]], seconds: float) -> None:
    assert _START.seconds(faults) == pytest.approx(seconds)
