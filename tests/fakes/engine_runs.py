"""Run directories for an engine, and their journals read back. Plays the server: writes run.json, nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from gpu_service.catalog import base_models
from gpu_service.domain.planned_data import PlannedData
from gpu_service.journal import Reader
from tests.fakes import datasets, tiny_models
from tunesmith.common.v1 import event_pb2, plan_pb2

# Two traits, one of chat and one of completions, each with held-out data; short, so that a step is quick.
_CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} plus {n}?"},
            {"role": "assistant", "content": f"{2 * n} is it. " * (1 + n % 3)},
        ]
    }
    for n in range(24)
]
_COMPLETIONS = [{"prompt": f"def add_{n}(", "completion": f"left, right={n}): return left + right"} for n in range(24)]
HYPERPARAMETERS: dict[str, Any] = {
    "num_steps": 2,
    "batch": {"examples": 4},
    "optimizer": {"learning_rate": 1e-2},
    "schedule": {"name": "cosine", "warmup_steps": 1},
    "max_length": 64,
    "save_every_steps": 0,
}
LORA: dict[str, Any] = {"rank": 4}


@dataclass(frozen=True, kw_only=True)
class TraitRows:
    """A trait with one dataset, and one of held-out rows unless there are none."""

    trait_type: str
    rows: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]] = ()
    format: str = "prompt-completion"


@dataclass(kw_only=True)
class Workspace:
    """A node's folders below `root`."""

    root: Path
    _placed: set[str] = field(default_factory=set)

    @property
    def models_directory(self) -> Path:
        return self.root / "models"

    @property
    def blobs_directory(self) -> Path:
        return self.root / "blobs"

    @property
    def cache_directory(self) -> Path:
        return self.root / "cache"

    def place_model(self, options: tiny_models.TinyOptions) -> str:
        """A tiny checkpoint, once; its name."""
        name = f"tiny/{options.name}"
        if name not in self._placed:
            tiny_models.place(self.models_directory, options)
            self._placed.add(name)
        return name

    def make_run(
        self,
        job_id: str,
        *,
        options: tiny_models.TinyOptions | None = None,
        base_model: str | None = None,
        training_type: str = "qlora",
        hyperparameters: Mapping[str, Any] | None = None,
        sample_prompts: Iterable[Mapping[str, Any]] = (),
        device: Mapping[str, Any] | None = None,
        attempt: int = 1,
        resume: Mapping[str, Any] | None = None,
        chat: bool = True,
        held_out: bool = True,
        traits: Sequence[TraitRows] = (),
        start: Path | None = None,
        task: str = "",
        trainer: str = "",
    ) -> Path:
        """A run directory with its run.json; `traits` replace the two that there are.

        `start`: an artifact or checkpoint of an earlier run to begin with; `trainer`: what its node expects of it.
        """
        options = options or tiny_models.TinyOptions()
        name = base_model or self.place_model(options)
        spec = self.make_spec(
            name,
            model_type=options.family,
            training_type=training_type,
            hyperparameters=hyperparameters or {},
            sample_prompts=list(sample_prompts),
            chat=chat,
            held_out=held_out,
        )
        if traits:
            spec |= self._describe(traits)
        if task:
            spec |= {"task": task, "traits": [], "datasets": []}
        if start is not None:
            spec["start_from"] = {"job_id": "earlier", "name": start.name}
        directory = self.root / "runs" / job_id / str(attempt)
        directory.mkdir(parents=True)
        model_directory = self.models_directory / name
        request = {
            "installation_id": "installation",
            "job_id": job_id,
            "attempt": attempt,
            "spec_digest": "0" * 64,
            "spec": spec,
            "weights_digest": base_models.weights_digest(model_directory),
            "model_directory": str(model_directory),
            "blobs_directory": str(self.blobs_directory),
            "cache_directory": str(self.cache_directory),
            "device": dict(device or {"type": "cpu", "index": -1}),
            "resume": resume,
            "trainer": trainer,
            "start_from": None if start is None else {"directory": str(start), "name": start.name},
        }
        (directory / "run.json").write_text(json.dumps(request), encoding="utf-8")
        return directory

    def _describe(self, traits: Sequence[TraitRows]) -> dict[str, Any]:
        """`traits` and `datasets` of a spec. Trait number n has dataset n, and held-out dataset n + 100."""
        described, references = [], []
        for number, trait in enumerate(traits, start=1):
            entry: dict[str, Any] = {
                "trait_type": trait.trait_type,
                "datasets": [{"dataset_id": number, "percentage": 100}],
            }
            references.append(datasets.write_blob(self.blobs_directory, number, trait.rows, trait.format))
            if trait.held_out:
                entry["held_out_dataset_ids"] = [number + 100]
                references.append(datasets.write_blob(self.blobs_directory, number + 100, trait.held_out, trait.format))
            described.append(entry)
        references.sort(key=lambda reference: reference["dataset_id"])
        return {"traits": described, "datasets": references}

    def open_data(self, data_digest: str) -> PlannedData:
        """The data of a run that was planned here."""
        for path in self.cache_directory.rglob("plan.json"):
            if json.loads(path.read_text())["data_digest"] == data_digest:
                return PlannedData.open(path.parent)
        raise AssertionError("the run's plan is not in the cache")

    def find_plan(self, plan: plan_pb2.Plan) -> Path:
        """The directory of a plan that was made here."""
        for path in self.cache_directory.rglob("plan.json"):
            if json_format.Parse(path.read_text(), plan_pb2.Plan()) == plan:
                return path.parent
        raise AssertionError("the plan is not in the cache")

    def resume_point(self, run_directory: Path, step: int) -> dict[str, Any]:
        """`resume` of a run.json: the checkpoint that an earlier run wrote after `step` steps."""
        name = f"step-{step:08d}"
        return {"checkpoint_directory": str(run_directory / "checkpoints" / name), "checkpoint": name, "step": step}

    def make_spec(
        self,
        base_model: str,
        *,
        model_type: str,
        training_type: str,
        hyperparameters: Mapping[str, Any],
        sample_prompts: list[Mapping[str, Any]],
        chat: bool,
        held_out: bool,
    ) -> dict[str, Any]:
        """A spec of two traits as proto JSON; `hyperparameters` replace whole fields of the small defaults."""
        rows, format = (_CHAT, "chat-messages") if chat else (_COMPLETIONS, "prompt-completion")
        references = [
            datasets.write_blob(self.blobs_directory, 1, rows[:16], format),
            datasets.write_blob(self.blobs_directory, 2, _COMPLETIONS[:16], "prompt-completion"),
            datasets.write_blob(self.blobs_directory, 3, rows[16:], format),
            datasets.write_blob(self.blobs_directory, 4, _COMPLETIONS[16:], "prompt-completion"),
        ]
        lora = {} if training_type == "full" else {"lora": LORA}
        return {
            "base_model": base_model,
            "model_type": model_type,
            "training_type": training_type,
            "traits": [
                {
                    "trait_type": trait,
                    "datasets": [{"dataset_id": number, "percentage": 100}],
                    "held_out_dataset_ids": [number + 2] if held_out else [],
                }
                for trait, number in (("arithmetic", 1), ("coding", 2))
            ],
            "hyperparameters": {**HYPERPARAMETERS, **lora, **hyperparameters},
            "sample_prompts": sample_prompts,
            "datasets": references if held_out else references[:2],
        }


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """A run's events, oldest first."""

    payloads: list[event_pb2.EventPayload]

    def of(self, kind: str) -> list[Any]:
        """The events of one kind, by the oneof's field name."""
        return [getattr(payload, kind) for payload in self.payloads if payload.WhichOneof("kind") == kind]

    @property
    def states(self) -> list[str]:
        return [event_pb2.RunState.Name(event.state).removeprefix("RUN_STATE_") for event in self.of("run_state")]

    @property
    def phases(self) -> list[str]:
        return [event_pb2.Phase.Name(event.phase).removeprefix("PHASE_") for event in self.of("phase")]

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by step."""
        return {event.step: event.loss for event in self.of("step")}

    @property
    def stages(self) -> list[tuple[str, str]]:
        """(stage, status) of every loading event."""
        return [
            (
                event_pb2.LoadingStage.Name(event.stage).removeprefix("LOADING_STAGE_"),
                event_pb2.StageStatus.Name(event.status).removeprefix("STAGE_STATUS_"),
            )
            for event in self.of("loading")
        ]

    def progress(self, stage: str, unit: str) -> list[int]:
        """What a stage said was done, in the order told."""
        return [
            event.done
            for event in self.of("loading")
            if event.stage == event_pb2.LoadingStage.Value(f"LOADING_STAGE_{stage}")
            and event.status == event_pb2.STAGE_STATUS_PROGRESS
            and event.unit == unit
        ]

    def stage_details(self, stage: str) -> dict[str, str]:
        """What a finished stage said it made."""
        finished = [
            event
            for event in self.of("loading")
            if event.stage == event_pb2.LoadingStage.Value(f"LOADING_STAGE_{stage}")
            and event.status == event_pb2.STAGE_STATUS_FINISHED
        ]
        return dict(finished[-1].details)


def read_log(run_directory: Path) -> RunLog:
    """The journal of a run so far."""
    payloads: list[event_pb2.EventPayload] = []
    sequence = 0
    with Reader(run_directory / "journal") as reader:
        while records := reader.read(sequence, limit=4096):
            for record in records:
                payloads.append(event_pb2.EventPayload.FromString(record.decode().payload))
                sequence = record.run_sequence
    return RunLog(payloads=payloads)


class StopAfterStep:
    """The `notify` of a run in this process that asks its `switch` for a checkpoint stop once a step was told."""

    def __init__(self, run_directory: Path, step: int) -> None:
        from gpu_service.engine.stopping import StopSwitch

        self.switch = StopSwitch()
        self._journal = run_directory / "journal"
        self._step = step

    def __call__(self, notice: Mapping[str, Any]) -> None:
        from gpu_service.engine.stopping import StopMode

        if notice["type"] != "journal":
            return
        with Reader(self._journal) as reader:
            (record,) = reader.read(notice["run_sequence"] - 1, limit=1)
        if event_pb2.EventPayload.FromString(record.decode().payload).step.step == self._step:
            self.switch.request(StopMode.CHECKPOINT)
