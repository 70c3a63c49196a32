"""The real engine, but for a training step at which the device is given a kernel that never ends.

Run as `python -m tests.fakes.kernel_hang --control-fd N`. The step is `hang_at_step` of the JSON object in the run's
first sample prompt; a run without one is trained as it is.
"""

from __future__ import annotations

import json
import sys

import torch

from gpu_service.engine import entrypoint, session
from gpu_service.engine.training.loop import TrainingLoop

# Of the device's clock: more than it makes in a year.
_ENDLESS_CYCLES = 1 << 60


class _HangingLoop(TrainingLoop):
    def _step(self, step: int) -> None:
        run = json.loads((self.checkpoints.directory.parent / "run.json").read_text())
        prompts = run["spec"].get("sample_prompts", [])
        if prompts and json.loads(prompts[0]["prompt"]).get("hang_at_step") == step + 1:
            torch.cuda._sleep(_ENDLESS_CYCLES)
        super()._step(step)


if __name__ == "__main__":
    # What a session is made of is not its users' to choose; this process is nobody's engine but a test's.
    session.__dict__["TrainingLoop"] = _HangingLoop
    sys.exit(entrypoint.main(sys.argv[1:]))
