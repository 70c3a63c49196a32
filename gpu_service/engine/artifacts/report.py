"""The report artifact: every number of a run as JSON, and a plot of its losses. Draws without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gpu_service.engine.training.progress import TrainingProgress
from tunesmith.common.v1 import event_pb2, plan_pb2, training_spec_pb2

_VERSION = 1
_SIZE_INCHES = (9, 5.5)
# What a loss is the mean over, by objective.
_COUNTED = {"sft": "target token", "dpo": "pair"}


def collect(
    *,
    spec: training_spec_pb2.TrainingSpec,
    plan: plan_pb2.Plan,
    progress: TrainingProgress,
    job_id: str,
    stopped_early: bool,
    versions: dict[str, str],
    exports: Sequence[event_pb2.ExportEvent] = (),
) -> dict[str, Any]:
    """The content of metrics.json. Losses are nats per target token, of `dpo` per pair; null: not finite."""
    return {
        "version": _VERSION,
        "job_id": job_id,
        "base_model": spec.base_model,
        "training_type": plan.training_type,
        "data_digest": plan.data_digest,
        "num_steps": progress.steps_done,
        "planned_steps": plan.num_steps,
        "stopped_early": stopped_early,
        "num_examples": progress.num_examples,
        "num_tokens": progress.num_tokens,
        "num_target_tokens": progress.num_target_tokens,
        "training_seconds": progress.training_seconds,
        "evaluations": progress.evaluations,
        "samples": progress.samples,
        "steps": progress.steps,
        "exports": [
            json_format.MessageToDict(
                export, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
            for export in exports
        ],
        "plan": json_format.MessageToDict(plan, preserving_proto_field_name=True),
        "versions": versions,
    }


def plot(progress: TrainingProgress, path: Path, *, objective: str) -> None:
    """Training loss by trait as lines, held-out loss by trait as marks joined by dashes; PNG."""
    draw(progress, objective).savefig(path, dpi=110)


def draw(progress: TrainingProgress, objective: str) -> Figure:
    """The plot itself, on no display; `objective` by its id."""
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, trait in enumerate(_traits(progress)):
        color = f"C{index % 10}"
        steps, losses = _training_line(progress, trait)
        if steps:
            axes.plot(steps, losses, color=color, linewidth=1.2, alpha=0.8, label=f"{trait}, training")
        steps, losses = _held_out_line(progress, trait)
        if steps:
            axes.plot(steps, losses, color=color, linestyle="--", marker="o", markersize=7, label=f"{trait}, held out")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (nats per {_COUNTED[objective]})")
    axes.grid(visible=True, alpha=0.3)
    if axes.has_data():
        axes.legend()
    return figure


def _traits(progress: TrainingProgress) -> list[str]:
    rows = [row for step in progress.steps for row in step["trait_losses"]]
    rows += [row for evaluation in progress.evaluations for row in evaluation["losses"]]
    return list(dict.fromkeys(row["trait_type"] for row in rows))


def _training_line(progress: TrainingProgress, trait: str) -> tuple[list[int], list[float]]:
    points = [
        (step["step"], row["loss"])
        for step in progress.steps
        for row in step["trait_losses"]
        if row["trait_type"] == trait and row["loss"] is not None
    ]
    return [step for step, _ in points], [loss for _, loss in points]


def _held_out_line(progress: TrainingProgress, trait: str) -> tuple[list[int], list[float]]:
    points = [
        (evaluation["step"], row["loss"])
        for evaluation in progress.evaluations
        for row in evaluation["losses"]
        if row["trait_type"] == trait and row["dataset_id"] == 0 and row["loss"] is not None
    ]
    return [step for step, _ in points], [loss for _, loss in points]
