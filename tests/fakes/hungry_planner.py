"""An engine's planning with a planner that wants much memory, in a process of its own: `hungry_planner DIRECTORY BYTES`
prints the reason and the signal of the failure that it comes to."""

from __future__ import annotations

import sys
from pathlib import Path

from gpu_service.engine import planning
from gpu_service.engine.failures import RunFailure
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.request import DeviceChoice, RunRequest
from gpu_service.engine.stopping import StopSwitch
from gpu_service.journal import Writer
from tunesmith.common.v1 import errors_pb2, training_spec_pb2


def main(directory: Path, num_bytes: int) -> None:
    request = RunRequest(
        run_directory=directory,
        job_id="job",
        attempt=1,
        spec_digest="0",
        spec=training_spec_pb2.TrainingSpec(),
        spec_json={},
        weights_digest="12ab",
        model_directory=directory,
        blobs_directory=directory,
        cache_directory=directory,
        device=DeviceChoice(type="cpu"),
        resume=None,
    )
    with Writer.open(directory / "journal", 1) as writer:
        try:
            begun = planning.begin(
                request,
                command=(sys.executable, "-c", f"held = b'x' * {num_bytes}"),
                device={"type": "cpu"},
            )
            reporter = Reporter(run_directory=directory, writer=writer, notify=lambda notice: None)
            planning.finish(begun, switch=StopSwitch(), reporter=reporter)
        except RunFailure as error:
            sys.stdout.write(f"{errors_pb2.ErrorReason.Name(error.failure.reason)} {error.failure.signal}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
