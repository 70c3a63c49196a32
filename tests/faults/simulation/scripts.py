"""How attempts go if nothing happens to them, drawn when a node accepts them: to the end, or to a failure."""

from __future__ import annotations

import random
from dataclasses import replace

from control_service.app.ports import StartRun
from control_service.domain.failure import Failure, Fault
from tests.faults.simulation.run import Script

_FAILURES: tuple[tuple[str, Fault], ...] = (
    ("ENGINE_KILLED", Fault.PLATFORM),
    ("ENGINE_EXITED", Fault.PLATFORM),
    ("HANG", Fault.PLATFORM),
    ("HOST_OUT_OF_MEMORY", Fault.PLATFORM),
    ("CHECKPOINT_WRITE", Fault.PLATFORM),
    ("TRAINING", Fault.PLATFORM),
    ("DEVICE_OUT_OF_MEMORY", Fault.HARDWARE),
    ("NON_FINITE_LOSS", Fault.USER),
    ("DOES_NOT_FIT", Fault.USER),
    ("RESUME_MISMATCH", Fault.HARDWARE),
)


class Scripts:
    """Of all nodes."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        # Jobs whose every attempt kills its engine.
        self.poison: set[str] = set()
        # No attempt fails any more, but for those.
        self.is_calm = False

    def draw(self, request: StartRun) -> Script:
        """The script of an attempt."""
        dice = self._dice
        num_steps, step_seconds = dice.randint(3, 10), dice.choice((0.1, 1.0, 3.0))
        if dice.random() < 0.2:
            # So long that nothing but heartbeats is heard in between.
            num_steps, step_seconds = 3, 40.0
        begins = request.resume_from.step if request.resume_from else 0
        script = Script(
            num_steps=max(num_steps, begins + 1),
            step_seconds=step_seconds,
            save_every=dice.choice((0, 2, 3)),
            stop_seconds=dice.choice((0.0, 0.0, 5.0)),
        )
        if request.key.job_id in self.poison:
            poison = Failure(reason="ENGINE_KILLED", fault=Fault.PLATFORM, message="poison", signal=11)
            return replace(script, fail_at_step=begins + 1, failure=poison)
        if self.is_calm or dice.random() < 0.8:
            return script
        reason, fault = dice.choice(_FAILURES)
        details = {}
        if reason == "RESUME_MISMATCH" and request.resume_from is not None:
            details = {"checkpoint": request.resume_from.checkpoint}
        failure = Failure(reason=reason, fault=fault, message="scripted", details=details)
        return replace(script, fail_at_step=dice.randint(1, num_steps), failure=failure)
