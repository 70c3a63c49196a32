"""The README that goes with what was trained: base, data, mix, hyper-parameters, losses, comparisons. Text only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from google.protobuf import json_format

from gpu_service.domain.defaults import LOW
from gpu_service.engine.training.progress import TrainingProgress
from tunesmith.common.v1 import event_pb2, plan_pb2, training_spec_pb2

_USE_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base_model!r})
model = PeftModel.from_pretrained(base, "path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```"""
_USE_MODEL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")
```"""
_COMPARED = (
    "Computed in float32 over {positions} positions of {prompts} fixed prompts. The first row is what merging did, "
    "rounding to 16 bits included; it is held against a threshold of {threshold:g}. The second adds what quantization "
    "had done to the base that the adapter was trained on."
)


class Kind(Enum):
    """What a card is of."""

    ADAPTER = "adapter"
    MODEL = "model"
    MERGED = "merged model"


_LIBRARY: Mapping[Kind, str] = {Kind.ADAPTER: "peft", Kind.MODEL: "transformers", Kind.MERGED: "transformers"}
# As model hubs call a model's relation to its base.
_RELATION: Mapping[Kind, str] = {Kind.ADAPTER: "adapter", Kind.MODEL: "finetune", Kind.MERGED: "finetune"}
_USE: Mapping[Kind, str] = {Kind.ADAPTER: _USE_ADAPTER, Kind.MODEL: _USE_MODEL, Kind.MERGED: _USE_MODEL}


def render(
    *,
    kind: Kind,
    spec: training_spec_pb2.TrainingSpec,
    plan: plan_pb2.Plan,
    progress: TrainingProgress,
    job_id: str,
    stored_dtype: Any,
    stopped_early: bool,
    versions: dict[str, str],
    exports: Sequence[event_pb2.ExportEvent] = (),
    earlier_card: str = "",
) -> str:
    """The whole card in Markdown. `earlier_card`: of the adapter, when nothing was trained here."""
    title = spec.base_model.rpartition("/")[2]
    parts = [
        _front_matter(spec, kind),
        f"# {title}: {plan.training_type} {kind.value}",
        _origin(spec, plan, job_id, kind),
        _USE[kind].format(base_model=spec.base_model),
    ]
    if kind is Kind.MERGED:
        parts += [_comparison(export) for export in exports]
    if earlier_card:
        parts += ["## The adapter", _body(earlier_card)]
    elif not spec.task or spec.task == "train":
        parts += _training(spec, plan, progress, stored_dtype if kind is Kind.MODEL else None, stopped_early)
    parts += ["## Versions", ", ".join(f"{name} {version}" for name, version in versions.items())]
    return "\n\n".join(parts) + "\n"


def _front_matter(spec: training_spec_pb2.TrainingSpec, kind: Kind) -> str:
    return "\n".join(
        (
            "---",
            f"base_model: {json.dumps(spec.base_model)}",
            f"base_model_relation: {_RELATION[kind]}",
            f"library_name: {_LIBRARY[kind]}",
            "pipeline_tag: text-generation",
            "tags: [tunesmith]",
            "---",
        )
    )


def _origin(spec: training_spec_pb2.TrainingSpec, plan: plan_pb2.Plan, job_id: str, kind: Kind) -> str:
    base = f"`{spec.base_model}` (weights `{plan.weights_digest}`)"
    start = spec.start_from
    if spec.task == "export":
        return f"The `{start.name}` of job `{start.job_id}` in {base}, written by job `{job_id}`."
    text = f"Trained from {base} by job `{job_id}`."
    if start.job_id:
        text += f" It started from the `{start.name}` of job `{start.job_id}`."
    if plan.resolved.compute == "fp8":
        text += (
            " In training, the base's frozen weights, what they were multiplied by, and gradients were rounded to"
            " 8 bits (fp8 e4m3): other numerics than bfloat16's. Of eight blocks or more, the first two and the last"
            " were left out of it."
        )
    if kind is Kind.MERGED:
        text += " The adapter was added to the base's original weights in float32, and the sums rounded to 16 bits."
    return text


def _comparison(export: event_pb2.ExportEvent) -> str:
    rows = (
        ("the adapter on the original base", export.max_logit_difference, export.mean_logit_difference),
        (
            "the adapter on the base as trained",
            export.trained_max_logit_difference,
            export.trained_mean_logit_difference,
        ),
    )
    same = (export.num_same_top_tokens, export.trained_num_same_top_tokens)
    lines = ["| compared with | largest | mean | same top token |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {largest:.4g} | {mean:.4g} | {agreeing} of {export.num_positions} |"
        for (name, largest, mean), agreeing in zip(rows, same, strict=True)
    ]
    explained = _COMPARED.format(positions=export.num_positions, prompts=export.num_prompts, threshold=export.threshold)
    return "\n\n".join(("## Difference of logits", "\n".join(lines), explained))


def _body(card: str) -> str:
    """An earlier card without its front matter, a level deeper."""
    lines = card.splitlines()
    if lines[:1] == ["---"]:
        lines = lines[lines.index("---", 1) + 1 :]
    in_code, shown = False, []
    for line in lines:
        in_code = in_code != line.startswith("```")
        shown.append(f"#{line}" if line.startswith("#") and not in_code else line)
    return "\n".join(shown).strip()


def _training(
    spec: training_spec_pb2.TrainingSpec,
    plan: plan_pb2.Plan,
    progress: TrainingProgress,
    trained_whole: Any,
    stopped_early: bool,
) -> list[str]:
    return [
        "## Data",
        _data_table(spec, plan),
        _mix(spec, plan),
        f"Data digest `{plan.data_digest}`; spec digest `{plan.spec_digest}`.",
        "## Training",
        f"{progress.steps_done} of {plan.num_steps} steps, {progress.num_examples} examples, "
        f"{progress.num_tokens} tokens ({progress.num_target_tokens} with loss), {progress.training_seconds:.0f} s."
        + (" The time limit ended it early." if stopped_early else "")
        + ("" if trained_whole is None else f" Trained in {_held_in(plan)}, saved as {trained_whole}."),
        "## Held-out loss",
        _loss_table(progress),
        "## Hyper-parameters",
        "```json\n"
        + json.dumps(json_format.MessageToDict(plan.resolved, preserving_proto_field_name=True), indent=1)
        + "\n```",
    ]


def _held_in(plan: plan_pb2.Plan) -> str:
    if plan.resolved.full_memory == LOW:
        return "bfloat16 with moments of 8 bits, both rounded by chance"
    return "float32"


def _mix(spec: training_spec_pb2.TrainingSpec, plan: plan_pb2.Plan) -> str:
    mix = spec.mix
    total = f"{mix.total} {mix.unit or 'examples'}" if mix.HasField("total") else "as much as the data allow"
    weights = ", ".join(
        f"{trait.trait_type} {trait.weight if trait.HasField('weight') else 1:g}" for trait in spec.traits
    )
    return (
        f"Mix: {total} an epoch by {mix.unit or 'examples'}, policy `{mix.policy or 'shrink'}`; weights {weights}. "
        f"{plan.examples_per_epoch} examples an epoch, {plan.num_epochs:g} epochs."
    )


def _data_table(spec: training_spec_pb2.TrainingSpec, plan: plan_pb2.Plan) -> str:
    hashes = {reference.dataset_id: reference.sha256 for reference in spec.datasets}
    rows = [
        "| trait | dataset | use | share | examples an epoch | tokens | with loss | examples in all | SHA-256 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {row.trait_type} | {row.dataset_id} | {'held out' if row.held_out else 'training'} | {row.share:.4f} "
        f"| {row.num_examples} | {row.num_tokens} | {row.num_target_tokens} | {row.run_examples} "
        f"| `{hashes.get(row.dataset_id, '')}` |"
        for row in plan.datasets
    ]
    return "\n".join(rows)


def _loss_table(progress: TrainingProgress) -> str:
    if not progress.evaluations:
        return "No held-out data."
    rows = ["| moment | step | trait | dataset | loss |", "|---|---|---|---|---|"]
    for evaluation in progress.evaluations:
        for value in [{"trait_type": "all", "dataset_id": 0, "loss": evaluation["loss"]}, *evaluation["losses"]]:
            loss = "not finite" if value["loss"] is None else f"{value['loss']:.4f}"
            dataset = value["dataset_id"] or "all"
            moment = evaluation["moment"].lower()
            rows.append(f"| {moment} | {evaluation['step']} | {value['trait_type']} | {dataset} | {loss} |")
    return "\n".join(rows)
