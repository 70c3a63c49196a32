"""The exact plan: from a request to a plan directory. Loads no weight and asks no device."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from gpu_service.catalog.base_models import BaseModel, read_directory
from gpu_service.catalog.datasets import REGISTRY
from gpu_service.doctor import read_versions
from gpu_service.domain.checked_plan import CheckedPlan, DatasetPlan
from gpu_service.domain.defaults import default_warmup_steps
from gpu_service.domain.device import Device
from gpu_service.domain.fitting import fit
from gpu_service.domain.memory_calibration import UNCALIBRATED, Calibration
from gpu_service.domain.memory_estimate import estimate_memory
from gpu_service.domain.order import ORDER_VERSION
from gpu_service.domain.plan import check_fit, check_host_fit, resolve
from gpu_service.domain.plan_warnings import CHECK_WARNINGS
from gpu_service.domain.planned_data import (
    DATA_FILE,
    DATA_VERSION,
    HELD_OUT_FILE,
    PLAN_FILE,
    SELECTION_FILE,
    STEP_OFFSETS_FILE,
    STEP_PLACES_FILE,
    PlannedData,
    PlannedDataDamaged,
    Source,
    TokenShard,
)
from gpu_service.domain.spec import TrainingSpec, spec_digest
from gpu_service.planner.choosing import Chooser, ChosenSource
from gpu_service.planner.pass_sizes import find_largest_passes
from gpu_service.planner.progress import Progress
from gpu_service.planner.selection import (
    RunSteps,
    Selection,
    count_duplicates,
    count_sources,
    find_largest_step,
    make_steps,
    select,
)
from gpu_service.planner.staging import is_there, stage_directory
from gpu_service.planner.token_store import TokenStores
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
    # What trained the steps before the checkpoint that the run goes on from; empty where it begins.
    begun_by: str = ""
    # What the node measured, by kind of run.
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)

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
            begun_by=value.get("begun_by") or "",
            calibrations={
                kind: Calibration.from_json(cells) for kind, cells in (value.get("calibrations") or {}).items()
            },
        )

    def calibration_of(self, plan: CheckedPlan) -> Calibration:
        """What the node measured of runs like this plan's."""
        return self.calibrations.get(plan.kind_of_run, UNCALIBRATED)


def make_plan(request: PlanRequest, *, stream: TextIO, versions: Mapping[str, str] | None = None) -> Path:
    """Plans exactly and returns the plan directory; progress goes to `stream`. Raises `Refusal`, `OSError`.

    `versions` are those of the libraries of this very interpreter, which is the engine's: they decide who quantizes.
    They are read where they are not given.
    """
    spec = request.spec
    base = replace(read_directory(request.model_directory, spec.base_model), weights_digest=request.weights_digest)
    checked = resolve(
        spec,
        base,
        request.device,
        read_versions() if versions is None else versions,
        spec_digest=request.spec_digest,
        calibrations=request.calibrations,
        begun_by=request.begun_by,
    )
    stores, warnings, progress = _make_stores(request, checked, base, stream)
    with stores:
        sources, idle = Chooser(spec, checked, stores).choose()
        shards = [source.draw.close() for source in sources]
    progress.finish()
    selection = select(sources, seed=checked.hyperparameters.seed)
    run = make_steps(spec.hyperparameters, selection)
    data = _open_data(checked, sources, shards, selection, run)
    exact = _complete(checked, spec, sources, idle, selection, run, data, request.calibration_of(checked))
    exact = replace(exact, warnings=(*exact.warnings, *warnings))
    return _write(request.cache_directory, exact, sources, shards, selection, run)


def _make_stores(
    request: PlanRequest, checked: CheckedPlan, base: BaseModel, stream: TextIO
) -> tuple[TokenStores, list[str], Progress]:
    """What gives tokens for this plan, and what is worth knowing about its tokenizer and template."""
    resolved = checked.hyperparameters
    tools = load_toolchain(
        base,
        cache_directory=request.cache_directory,
        chat_template=resolved.chat_template,
        max_length=resolved.max_length,
        loss_on=resolved.loss_on,
        keeps_ids=True,
    )
    progress = Progress(stream, total=sum(dataset.num_examples for dataset in checked.datasets))
    stores = TokenStores(
        blobs_directory=request.blobs_directory, cache_directory=request.cache_directory, tools=tools, progress=progress
    )
    wanted = {dataset.dataset_id for dataset in checked.datasets}
    formats = [reference.format for reference in request.spec.datasets if reference.dataset_id in wanted]
    warnings = []
    if tools.chat is not None and tools.chat.uses_date:
        warnings.append("the chat template writes today's date; a fixed one is rendered, so that tokens stay the same")
    if tools.tokenizer.end_token_id is None and not all(REGISTRY[name].needs_chat_template for name in formats):
        warnings.append("the tokenizer names no end of sequence, so no text ends with one")
    return stores, warnings, progress


def _open_data(
    checked: CheckedPlan,
    sources: Sequence[ChosenSource],
    shards: Sequence[TokenShard],
    selection: Selection,
    run: RunSteps,
) -> PlannedData:
    """What was planned, as it will be read back from the plan directory."""
    return PlannedData(
        plan={},
        sources=[
            Source(
                trait_type=source.plan.trait_type,
                dataset_id=source.plan.dataset_id,
                held_out=source.plan.held_out,
                num_examples=shard.num_examples,
            )
            for source, shard in zip(sources, shards, strict=True)
        ],
        shards=shards,
        selection=memoryview(selection.references).cast("B"),
        held_out=memoryview(selection.held_out).cast("B"),
        steps=run.steps,
        batch=" ".join(map(str, *_batch(checked).items())),
        seed=selection.seed,
    )


def _complete(
    checked: CheckedPlan,
    spec: TrainingSpec,
    sources: Sequence[ChosenSource],
    idle: Sequence[DatasetPlan],
    selection: Selection,
    run: RunSteps,
    data: PlannedData,
    calibration: Calibration,
) -> CheckedPlan:
    """The checked plan with its counts, memory and digest made exact. Raises `Refusal` DOES_NOT_FIT."""
    given, resolved = spec.hyperparameters, checked.hyperparameters
    if given.schedule.warmup_steps is None:
        schedule = replace(resolved.schedule, warmup_steps=default_warmup_steps(data.num_steps))
        resolved = replace(resolved, schedule=schedule)
    fitted = fit(
        resolved,
        given,
        num_layers=checked.base_model.num_layers,
        device=checked.device,
        estimate=partial(
            estimate_memory,
            checked.base_model,
            quantization=checked.quantization,
            optimizer=checked.optimizer,
            covered_layers=checked.covered_layers,
            num_trainable_parameters=checked.num_trainable_parameters,
            passes=find_largest_passes(sources, selection, run, resolved),
            device=checked.device,
            calibration=calibration,
        ),
    )
    check_fit(fitted.memory.total_bytes, checked.device)
    check_host_fit(fitted.memory.host_bytes, checked.device)
    counts = count_sources(selection, run)
    rows = [source.plan for source in sources]
    for index, count in counts.items():
        rows[index] = replace(
            rows[index],
            run_examples=count.examples,
            run_tokens=count.tokens,
            run_target_tokens=count.target_tokens,
        )
    total_tokens = sum(count.tokens for count in counts.values())
    return replace(
        checked,
        level="EXACT",
        hyperparameters=fitted.resolved,
        num_epochs=run.num_epochs,
        num_steps=data.num_steps,
        total_examples=data.total_examples,
        total_tokens=total_tokens,
        total_target_tokens=sum(count.target_tokens for count in counts.values()),
        datasets=tuple(sorted([*rows, *idle], key=lambda row: (row.held_out, row.trait_type, row.dataset_id))),
        memory=fitted.memory,
        memory_reason=fitted.reason,
        fill=total_tokens / (data.num_steps * given.batch.tokens) if given.batch.tokens else 0.0,
        longest_example_tokens=max(selection.num_tokens),
        largest_step_tokens=find_largest_step(selection, run),
        num_duplicates=count_duplicates(selection, data.selection_entries()),
        data_digest=data.compute_digest(),
        warnings=(*(text for text in checked.warnings if text not in CHECK_WARNINGS), *_list_warnings(rows)),
    )


def _list_warnings(rows: Sequence[DatasetPlan]) -> list[str]:
    """Things about the data worth knowing that refuse nothing."""
    trained = sum(row.num_examples for row in rows if not row.held_out)
    held_out = sum(row.num_examples for row in rows if row.held_out)
    if held_out > trained:
        return [f"{held_out:,} examples are held out and evaluated, more than the {trained:,} of an epoch"]
    return []


def _batch(plan: CheckedPlan) -> dict[str, int]:
    """What makes a step, as the data file has it."""
    batch = plan.hyperparameters.batch
    return {"tokens": batch.tokens} if batch.tokens is not None else {"examples": batch.examples or 1}


def _write(
    cache_directory: Path,
    plan: CheckedPlan,
    sources: Sequence[ChosenSource],
    shards: Sequence[TokenShard],
    selection: Selection,
    run: RunSteps,
) -> Path:
    """Writes the plan directory under a name made of its content, so that the same plan is the same directory."""
    data = {
        "version": DATA_VERSION,
        "order_version": ORDER_VERSION,
        "seed": selection.seed,
        "batch": _batch(plan),
        "examples_per_epoch": len(selection),
        "held_out_examples": len(selection.held_out) // 2,
        "num_steps": plan.num_steps,
        "total_examples": plan.total_examples,
        "sources": [
            {
                "trait_type": source.plan.trait_type,
                "dataset_id": source.plan.dataset_id,
                "held_out": source.plan.held_out,
                "shard": f"../../tokens/{shard.directory.name}",
            }
            for source, shard in zip(sources, shards, strict=True)
        ],
    }
    files = {
        PLAN_FILE: json.dumps(plan.to_json(), sort_keys=True, indent=1).encode(),
        DATA_FILE: json.dumps(data, sort_keys=True, indent=1).encode(),
        SELECTION_FILE: selection.references.tobytes(),
        HELD_OUT_FILE: selection.held_out.tobytes(),
    }
    if run.packed is not None:
        places, offsets = run.packed
        files |= {STEP_PLACES_FILE: places.tobytes(), STEP_OFFSETS_FILE: offsets.tobytes()}
    name = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in files.values())).hexdigest()
    target = cache_directory / "plans" / name
    # Most often it is: a run begins with the plan that was asked for before.
    if is_there(target, is_whole=_is_whole):
        return target
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
