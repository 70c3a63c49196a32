"""Our side of a row: one run of the engine as a node makes it (planner, loading, training loop, journal).

Started by `benchmarks.against_peer`, which says when it may run. The run is cancelled when its last turn is over.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.turns import TurnTaker
from gpu_service.journal import Reader
from tunesmith.common.v1 import event_pb2

_PLAN_FIELDS = ("trainer", "trainer_reason", "memory", "resolved")


def read_events(directory: Path) -> Iterator[event_pb2.EventPayload]:
    """The journal of a run, oldest first."""
    sequence = 0
    with Reader(directory / "journal") as reader:
        while records := reader.read(sequence, limit=4096):
            for record in records:
                yield event_pb2.EventPayload.FromString(record.decode().payload)
                sequence = record.run_sequence


def fold(events: Iterable[event_pb2.EventPayload]) -> dict[str, Any]:
    """What the run's events say of its plan, trainer, steps and end."""
    from google.protobuf import json_format

    steps: dict[int, tuple[int, float]] = {}
    facts: dict[str, Any] = {"trained_by": "", "plan": {}, "failure": ""}
    for event in events:
        kind = event.WhichOneof("kind")
        if kind == "step":
            # Events count steps from 1.
            steps[event.step.step - 1] = (event.step.num_tokens, event.step.loss)
        elif kind == "plan":
            plan: Mapping[str, Any] = json_format.MessageToDict(event.plan, preserving_proto_field_name=True)
            facts["plan"] = {name: plan[name] for name in _PLAN_FIELDS if name in plan}
        elif kind == "log" and event.log.message.startswith("trained by "):
            facts["trained_by"] = event.log.message
        elif kind == "run_state" and event.run_state.HasField("failure"):
            facts["failure"] = event.run_state.failure.message
    numbers = range(len(steps))
    return {
        **facts,
        "step_tokens": [steps[number][0] for number in numbers],
        "losses": [steps[number][1] for number in numbers],
    }


@dataclass(kw_only=True)
class StepEvents:
    """Stands before the journal, from `listen` on; `silent` keeps the events of steps from it."""

    silent: bool
    kept: list[event_pb2.EventPayload] = field(default_factory=list)
    # When each step's event was in the journal, seconds of time.perf_counter; steps count from 0.
    told: dict[int, float] = field(default_factory=dict)

    def listen(self) -> None:
        from gpu_service.engine.reporter import Reporter

        emit = Reporter.emit

        def follow(reporter: Reporter, message: Any) -> None:
            is_step = isinstance(message, event_pb2.StepEvent)
            if is_step and self.silent:
                self.kept.append(event_pb2.EventPayload(step=message))
                return
            emit(reporter, message)
            if is_step:
                self.told[message.step - 1] = time.perf_counter()

        Reporter.emit = follow  # type: ignore[assignment,method-assign]

    def told_after_milliseconds(self, ends: Mapping[int, float]) -> list[float]:
        """From the end of each step on the device until its event was in the journal; none of a silent run."""
        return [round(1e3 * (self.told[step] - end), 3) for step, end in ends.items() if step in self.told]


def main() -> int:
    """Status 1 when the run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--turn-steps", type=int, required=True)
    parser.add_argument("--silent", action="store_true", help="keep the events of steps from the journal")
    arguments = parser.parse_args()
    taker = TurnTaker.of_environment()
    # Before torch is imported; as the node's engines have it.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    from benchmarks.peers.clock import StepClock, peak_allocated_bytes
    from gpu_service.engine.failures import library_versions
    from gpu_service.engine.resident import BaseShelf
    from gpu_service.engine.service import carry_out
    from gpu_service.engine.stopping import StopMode, StopSwitch

    events = StepEvents(silent=arguments.silent)
    events.listen()
    taker.tell_and_wait("imported")
    switch = StopSwitch()
    peaks: list[int] = []

    def end() -> None:
        # Before the run gives its memory back.
        peaks.append(peak_allocated_bytes())
        switch.request(StopMode.CANCEL)

    clock = StepClock(taker=taker, end_training=end, warmup_steps=arguments.warmup, turn_steps=arguments.turn_steps)
    carry_out(arguments.run, shelf=BaseShelf(), switch=switch, notify=lambda notice: None)
    facts = fold([*read_events(arguments.run), *events.kept])
    # A run in which every turn came was cancelled; any other has said why.
    if facts["failure"] or not peaks:
        print(facts["failure"] or "the run ended before its last turn", file=sys.stderr)
        return 1
    result = {
        **facts,
        "intervals": clock.intervals,
        "told_after_milliseconds": events.told_after_milliseconds(clock.ends),
        "profile": clock.profile,
        "first_batch_loss": facts["losses"][0],
        "peak_allocated_bytes": peaks[0],
        "versions": dict(library_versions()),
    }
    arguments.out.write_text(json.dumps(result), encoding="utf-8")
    taker.tell("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
