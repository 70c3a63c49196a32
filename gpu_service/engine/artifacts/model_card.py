"""The README that goes with a trained adapter or model: base, data, mix, hyper-parameters, losses. Text only."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import json_format

from gpu_service.engine.training.progress import TrainingProgress
from tunesmith.common.v1 import plan_pb2, training_spec_pb2

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


def render(
    *,
    spec: training_spec_pb2.TrainingSpec,
    plan: plan_pb2.Plan,
    progress: TrainingProgress,
    job_id: str,
    trains_adapter: bool,
    stored_dtype: Any,
    stopped_early: bool,
    versions: dict[str, str],
) -> str:
    """The whole card in Markdown."""
    kind = "adapter" if trains_adapter else "model"
    title = spec.base_model.rpartition("/")[2]
    use = (_USE_ADAPTER if trains_adapter else _USE_MODEL).format(base_model=spec.base_model)
    parts = [
        _front_matter(spec, trains_adapter),
        f"# {title}: {plan.training_type} {kind}",
        f"Trained from `{spec.base_model}` (weights `{plan.weights_digest}`) by job `{job_id}`.",
        use,
        "## Data",
        _data_table(spec, plan),
        f"Data digest `{plan.data_digest}`; spec digest `{plan.spec_digest}`.",
        "## Training",
        f"{progress.steps_done} of {plan.num_steps} steps, {progress.num_examples} examples, "
        f"{progress.num_tokens} tokens ({progress.num_target_tokens} with loss), {progress.training_seconds:.0f} s."
        + (" The time limit ended it early." if stopped_early else "")
        + ("" if trains_adapter or stored_dtype is None else f" Trained in float32, saved as {stored_dtype}."),
        "## Held-out loss",
        _loss_table(progress),
        "## Hyper-parameters",
        "```json\n"
        + json.dumps(json_format.MessageToDict(plan.resolved, preserving_proto_field_name=True), indent=1)
        + "\n```",
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(spec: training_spec_pb2.TrainingSpec, trains_adapter: bool) -> str:
    library = "peft" if trains_adapter else "transformers"
    return f"---\nbase_model: {json.dumps(spec.base_model)}\nlibrary_name: {library}\ntags: [tunesmith]\n---"


def _data_table(spec: training_spec_pb2.TrainingSpec, plan: plan_pb2.Plan) -> str:
    hashes = {reference.dataset_id: reference.sha256 for reference in spec.datasets}
    rows = ["| trait | dataset | use | share | examples | tokens | SHA-256 |", "|---|---|---|---|---|---|---|"]
    rows += [
        f"| {row.trait_type} | {row.dataset_id} | {'held out' if row.held_out else 'training'} | {row.share:.4f} "
        f"| {row.num_examples} | {row.num_tokens} | `{hashes.get(row.dataset_id, '')}` |"
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
