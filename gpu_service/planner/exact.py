"""The exact plan: from a request to a plan directory. Loads no weight and asks no device."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from gpu_service.catalog import datasets as dataset_formats
from gpu_service.catalog.base_models import BaseModel, read_directory
from gpu_service.domain.checked_plan import CheckedPlan, DatasetPlan
from gpu_service.domain.counts import count_run, plan_datasets
from gpu_service.domain.defaults import default_warmup_steps
from gpu_service.domain.device import Device
from gpu_service.domain.errors import refuse_user
from gpu_service.domain.memory_estimate import estimate_memory
from gpu_service.domain.order import ORDER_VERSION
from gpu_service.domain.plan import TOO_LONG_WARNING, check_fit, resolve
from gpu_service.domain.planned_data import (
    DATA_FILE,
    DATA_VERSION,
    PLAN_FILE,
    SELECTION_FILE,
    PlannedData,
    PlannedDataDamaged,
    TokenShard,
)
from gpu_service.domain.spec import TrainingSpec, spec_digest
from gpu_service.planner.progress import Progress
from gpu_service.planner.selection import PlannedSource, Selection, compute_data_digest, select
from gpu_service.planner.shards import ShardMaker
from gpu_service.planner.staging import stage_directory
from gpu_service.planner.toolchain import load_toolchain


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The request file, decoded. `weights_digest` and `spec_digest` are written into the plan; empty if not known."""

    spec: TrainingSpec
    model_directory: Path
    blobs_directory: Path
    cache_directory: Path
    device: Device
    weights_digest: str
    spec_digest: str

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PlanRequest":
        """Raises `Refusal` for a bad spec, `KeyError`, `TypeError` or `ValueError` for a bad request."""
        return cls(
            spec=TrainingSpec.from_json(value["spec"]),
            model_directory=Path(value["model_directory"]),
            blobs_directory=Path(value["blobs_directory"]),
            cache_directory=Path(value["cache_directory"]),
            device=Device.from_json(value.get("device", {})),
            weights_digest=value.get("weights_digest") or "",
            spec_digest=value.get("spec_digest") or spec_digest(value["spec"]),
        )


def make_plan(request: PlanRequest, *, stream: TextIO) -> Path:
    """Plans exactly and returns the plan directory; progress goes to `stream`. Raises `Refusal`, `OSError`."""
    spec = request.spec
    base = replace(read_directory(request.model_directory, spec.base_model), weights_digest=request.weights_digest)
    checked = resolve(spec, base, request.device, spec_digest=request.spec_digest)
    maker, warnings, progress = _make_maker(request, checked, base, stream)
    shards = {}
    for dataset_id in sorted({dataset.dataset_id for dataset in checked.datasets}):
        shards[dataset_id] = maker.ensure(spec.find_dataset(dataset_id))
    progress.finish()
    available = {dataset_id: shard.num_examples for dataset_id, shard in shards.items()}
    _refuse_nothing_left(checked, shards)
    planned = plan_datasets(spec.traits, checked.sources, checked.mix, available)
    sources = [
        PlannedSource(plan=plan, sha256=spec.find_dataset(plan.dataset_id).sha256, shard=shards[plan.dataset_id])
        for plan in planned
    ]
    selection, datasets, longest = select(sources, seed=checked.hyperparameters.seed)
    exact = _complete(checked, spec, sources, datasets, selection, longest)
    exact = replace(exact, warnings=(*exact.warnings, *warnings))
    return _write(request.cache_directory, exact, sources, selection)


def _make_maker(
    request: PlanRequest, checked: CheckedPlan, base: BaseModel, stream: TextIO
) -> tuple[ShardMaker, list[str], Progress]:
    """What makes shards for this plan, and what is worth knowing about its tokenizer and template."""
    resolved = checked.hyperparameters
    tools = load_toolchain(
        base,
        cache_directory=request.cache_directory,
        chat_template=resolved.chat_template,
        max_length=resolved.max_length,
        loss_on=resolved.loss_on,
    )
    wanted = {dataset.dataset_id for dataset in checked.datasets}
    references = [reference for reference in request.spec.datasets if reference.dataset_id in wanted]
    progress = Progress(stream, total=sum(reference.num_examples for reference in references))
    maker = ShardMaker(
        blobs_directory=request.blobs_directory,
        tokens_directory=request.cache_directory / "tokens",
        settings=tools.settings,
        tokenizer=tools.tokenizer,
        chat=tools.chat,
        progress=progress,
    )
    documents = [item for item in references if not dataset_formats.REGISTRY[item.format].needs_chat_template]
    warnings = []
    if tools.chat is not None and tools.chat.uses_date:
        warnings.append("the chat template writes today's date; a fixed one is rendered, so that tokens stay the same")
    if tools.tokenizer.end_token_id is None and documents:
        warnings.append("the tokenizer names no end of sequence, so no text ends with one")
    return maker, warnings, progress


def _refuse_nothing_left(checked: CheckedPlan, shards: Mapping[int, TokenShard]) -> None:
    """A dataset that is wanted and of which nothing was left says why, rather than only that it is empty."""
    for dataset in checked.datasets:
        shard = shards[dataset.dataset_id]
        if (dataset.share or dataset.held_out) and not shard.num_examples:
            dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(shard.facts["dropped"].items()))
            raise refuse_user(
                "NO_EXAMPLES_LEFT",
                f"dataset {dataset.dataset_id} has no example left ({dropped or 'it is empty'}); "
                f"max_length is {checked.hyperparameters.max_length}",
                field="hyperparameters.max_length",
                stage="PLANNING",
                dataset_id=dataset.dataset_id,
            )


def _complete(
    checked: CheckedPlan,
    spec: TrainingSpec,
    sources: Sequence[PlannedSource],
    datasets: Sequence[DatasetPlan],
    selection: Selection,
    longest: int,
) -> CheckedPlan:
    """The checked plan with its counts, memory and digest made exact. Raises `Refusal` DOES_NOT_FIT."""
    given, resolved = spec.hyperparameters, checked.hyperparameters
    num_epochs, num_steps, total_examples = count_run(given, len(selection))
    if given.schedule.warmup_steps is None:
        schedule = replace(resolved.schedule, warmup_steps=default_warmup_steps(num_steps))
        resolved = replace(resolved, schedule=schedule)
    memory = estimate_memory(
        checked.base_model,
        resolved,
        checked.quantization,
        num_trainable_parameters=checked.num_trainable_parameters,
        optimizer_state_bytes=checked.optimizer.state_bytes_per_parameter,
        longest_tokens=longest,
        device_type=checked.device.type,
    )
    check_fit(memory.total_bytes, checked.device)
    counts = selection.count_run(total_examples)
    batch_examples = resolved.batch.examples
    return replace(
        checked,
        level="EXACT",
        hyperparameters=resolved,
        num_epochs=num_epochs,
        num_steps=num_steps,
        total_examples=total_examples,
        total_tokens=sum(count.tokens for count in counts.values()),
        total_target_tokens=sum(count.target_tokens for count in counts.values()),
        datasets=tuple(
            replace(
                dataset,
                run_examples=count.examples,
                run_tokens=count.tokens,
                run_target_tokens=count.target_tokens,
            )
            if (count := counts.get(index)) is not None
            else dataset
            for index, dataset in enumerate(datasets)
        ),
        memory=memory,
        data_digest=compute_data_digest(
            sources, selection, batch_examples=batch_examples or 1, total_examples=total_examples
        ),
        warnings=tuple(warning for warning in checked.warnings if warning != TOO_LONG_WARNING),
    )


def _write(cache_directory: Path, plan: CheckedPlan, sources: Sequence[PlannedSource], selection: Selection) -> Path:
    """Writes the plan directory under a name made of its content, so that the same plan is the same directory."""
    data = {
        "version": DATA_VERSION,
        "order_version": ORDER_VERSION,
        "seed": selection.seed,
        "batch_examples": plan.hyperparameters.batch.examples,
        "examples_per_epoch": len(selection),
        "total_examples": plan.total_examples,
        "sources": [
            {
                "trait_type": source.plan.trait_type,
                "dataset_id": source.plan.dataset_id,
                "held_out": source.plan.held_out,
                "shard": f"../../tokens/{source.shard.directory.name}",
            }
            for source in sources
        ],
    }
    files = {
        PLAN_FILE: json.dumps(plan.to_json(), sort_keys=True, indent=1).encode(),
        DATA_FILE: json.dumps(data, sort_keys=True, indent=1).encode(),
        SELECTION_FILE: selection.references.tobytes(),
    }
    name = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in files.values())).hexdigest()
    target = cache_directory / "plans" / name
    with stage_directory(target, is_whole=_is_whole) as staged:
        for file_name, content in files.items():
            (staged / file_name).write_bytes(content)
    return target


def _is_whole(directory: Path) -> bool:
    try:
        PlannedData.open(directory)
    except PlannedDataDamaged:
        return False
    return True
