"""`resolve`: every check of one option against another, on one page, before a weight or a row of data is read.

It decides nothing about single values (`defaults` does), about counts (`mix`) or bytes (`memory_estimate`), touches no
device, and knows nothing of library versions that are bad in themselves: the server refuses those.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from gpu_service.catalog import datasets as dataset_formats
from gpu_service.catalog import methods, optimizers, templates
from gpu_service.catalog.base_models import BaseModel, LinearLayer
from gpu_service.catalog.methods.entry import MethodEntry
from gpu_service.catalog.optimizers.entry import OptimizerEntry
from gpu_service.domain.checked_plan import CheckedPlan, DatasetPlan
from gpu_service.domain.counts import bound_datasets, bound_run, check_batch, content_of
from gpu_service.domain.defaults import (
    DEFAULT_BATCH_EXAMPLES,
    FP8,
    LOW,
    STANDARD,
    ResolvedHyperparameters,
    apply_defaults,
    check_ranges,
    default_max_length,
    resolve_mix,
)
from gpu_service.domain.device import Device
from gpu_service.domain.errors import refuse_user
from gpu_service.domain.fitting import check_asked, fit
from gpu_service.domain.memory_calibration import UNCALIBRATED, Calibration, kind_of_run
from gpu_service.domain.memory_estimate import estimate_memory
from gpu_service.domain.memory_passes import largest_possible
from gpu_service.domain.mix import compute_sources
from gpu_service.domain.plan_base import check_device, find_family, find_method, find_quantization, unsupported
from gpu_service.domain.plan_start import check_exports, check_start, check_task
from gpu_service.domain.plan_warnings import list_warnings
from gpu_service.domain.quantizer import choose_quantizer
from gpu_service.domain.recomputation import HOST_SPARE_BYTES
from gpu_service.domain.spec import Hyperparameters, TrainingSpec
from gpu_service.domain.trainer import FAST, choose_trainer, go_on_with

__all__ = [
    "CheckedPlan",
    "DatasetPlan",
    "Device",
    "ResolvedHyperparameters",
    "check_fit",
    "check_host_fit",
    "resolve",
]


def resolve(
    spec: TrainingSpec,
    base_model: BaseModel,
    device: Device,
    versions: Mapping[str, str] | None = None,
    *,
    spec_digest: str = "",
    calibrations: Mapping[str, Calibration] = MappingProxyType({}),
    begun_by: str = "",
) -> CheckedPlan:
    """The plan at level CHECK: pure, no torch, no data.

    `versions` are the installed distributions by name; None or empty when not known. Counts come from the registered
    number of examples; `calibrations` are what the device's node measured, by kind of run; `begun_by` is the trainer of
    the checkpoint that a run goes on from, empty where it begins.

    Raises `Refusal` with the reason, the field, and the loading stage that it would have broken:
    TRAINING_TYPE_UNKNOWN, QUANTIZATION_UNKNOWN, COMBINATION_NOT_ALLOWED, MODEL_TYPE_UNKNOWN, MODEL_TYPE_MISMATCH,
    MODEL_INVALID, DEVICE_UNSUPPORTED, TARGETS_MATCH_NOTHING, NOT_OFFERED, DATASET_NOT_FOUND, DATASET_FORMAT_UNKNOWN,
    CHAT_TEMPLATE_MISSING, MIX_INFEASIBLE, WEIGHTS_ALL_ZERO, PERCENTAGES_NOT_100, NO_EXAMPLES_LEFT, DOES_NOT_FIT,
    TOO_LARGE, INVALID_FIELD.
    """
    given = spec.hyperparameters
    if base_model.problem:
        raise refuse_user("MODEL_INVALID", base_model.problem, field="base_model", stage="CONFIG")
    check_ranges(given)
    trains = check_task(spec)
    method = find_method(spec)
    check_exports(spec, method)
    quantized = find_quantization(given, method)
    _check_objective(given, method)
    family = find_family(spec, base_model)
    check_device(given, quantized, device, versions or {})
    optimizer = _find_optimizer(given, device, versions or {})
    covered = _cover_layers(given, method, base_model)
    if spec.start_from is not None:
        before = _cover_layers(replace(given, lora=spec.start_from.lora), method, base_model)
        paths, paths_before = ([layer.path for layer in layers] for layers in (covered, before))
        check_start(spec, method, covered=paths, covered_before=paths_before)
    _check_lengths(given, base_model)
    _check_datasets(spec, base_model)
    mix = resolve_mix(spec.mix)
    # An export has no data: there is nothing to select or count.
    sources = compute_sources(spec.traits) if trains else []
    max_length = default_max_length(given, base_model.max_position_embeddings)
    longest = max_length * (2 if given.objective == "dpo" else 1)
    check_batch(given.batch, longest_tokens=longest, max_length=max_length)
    planned = bound_datasets(spec.traits, sources, mix, spec.datasets) if trains else ()
    num_epochs, num_steps, total_examples = (
        bound_run(given, sum(item.num_examples for item in planned if not item.held_out), longest_tokens=longest)
        if trains
        else (0.0, 0, 0)
    )
    resolved = apply_defaults(
        given,
        method=method,
        quantization=quantized,
        target_modules=given.lora.target_modules or tuple(sorted({layer.leaf for layer in covered})),
        device=device,
        length_limit=base_model.max_position_embeddings,
        num_steps=num_steps,
    )
    trainer = choose_trainer(given.trainer, resolved, family=family, base=base_model, device=device)
    if resolved.compute != FP8 and resolved.full_memory != LOW:
        trainer = go_on_with(trainer, asked=given.trainer, begun_by=begun_by)
    resolved = replace(resolved, trainer=trainer.path, full_memory=_resolve_full_memory(resolved, trainer.path))
    check_asked(
        given,
        trainer=trainer.path,
        trainer_reason=trainer.reason,
        trains_base=resolved.lora is None,
        num_layers=base_model.num_layers,
    )
    trainable = base_model.num_parameters
    if resolved.lora is not None:
        trainable = sum(resolved.lora.rank * (layer.in_features + layer.out_features) for layer in covered)
    kind = kind_of_run(
        training_type=method.id,
        quantization=quantized.id,
        compute_dtype=resolved.quantization.compute_dtype,
        model_type=family.id,
        optimizer=optimizer.id,
        recomputation=_describe_recomputation(given, trainer.path),
        objective=resolved.objective,
        # Held otherwise, it is another kind of run.
        trainer=f"{resolved.trainer}-{LOW}" if resolved.full_memory == LOW else resolved.trainer,
        compute=resolved.compute,
        base_weights=given.base_weights or "auto",
        device_name=device.name if device.type == "cuda" else device.type,
    )
    fitted = fit(
        resolved,
        given,
        num_layers=base_model.num_layers,
        device=device,
        estimate=partial(
            estimate_memory,
            base_model,
            quantization=quantized,
            optimizer=optimizer,
            covered_layers=covered,
            num_trainable_parameters=trainable,
            passes=largest_possible(resolved.batch, resolved.max_length),
            device=device,
            calibration=calibrations.get(kind, UNCALIBRATED),
        ),
    )
    resolved, memory = fitted.resolved, fitted.memory
    # The data's length is not known yet: only what is needed whatever its length can refuse here.
    check_fit(memory.standing_bytes, device)
    return CheckedPlan(
        level="CHECK",
        base_model=base_model,
        device=device,
        family=family,
        method=method,
        quantization=quantized,
        optimizer=optimizer,
        hyperparameters=resolved,
        mix=mix,
        sources=tuple(sources),
        datasets=planned,
        config_type=base_model.config_type or family.config_types[0],
        covered_layers=covered,
        num_trainable_parameters=trainable,
        num_epochs=num_epochs,
        num_steps=num_steps,
        total_examples=total_examples,
        memory=memory,
        kind_of_run=kind,
        trainer_reason=trainer.reason if trains else "",
        memory_reason=fitted.reason if trains else "",
        quantizer=choose_quantizer(
            quantized.id,
            compute_dtype=resolved.quantization.compute_dtype,
            trainer=resolved.trainer if trains else "",
            device=device,
            versions=versions or {},
        ),
        spec_digest=spec_digest,
        warnings=tuple(list_warnings(spec, base_model, method, resolved, mix, memory, device)),
    )


def check_fit(needed_bytes: int, device: Device) -> None:
    """Raises `Refusal` DOES_NOT_FIT when the empty device has less memory than this; of unknown size, it has enough."""
    if device.total_memory_bytes and needed_bytes > device.total_memory_bytes:
        raise refuse_user(
            "DOES_NOT_FIT",
            f"the run needs about {needed_bytes:,} bytes and {device.name} has {device.total_memory_bytes:,}",
            stage="WEIGHTS",
            needed_bytes=needed_bytes,
            total_memory_bytes=device.total_memory_bytes,
        )


def _resolve_full_memory(resolved: ResolvedHyperparameters, trainer: str) -> str | None:
    """None where it means nothing."""
    if resolved.lora is not None or trainer != FAST:
        return None
    return resolved.full_memory or STANDARD


def check_host_fit(needed_bytes: int, device: Device) -> None:
    """Raises `Refusal` DOES_NOT_FIT when the machine has no memory left beside what is to be locked.

    Of unknown size it has enough.
    """
    if not needed_bytes or not device.host_memory_bytes:
        return
    if needed_bytes + HOST_SPARE_BYTES > device.host_memory_bytes:
        raise refuse_user(
            "DOES_NOT_FIT",
            f"what waits in the host's memory needs {needed_bytes:,} bytes, and the host of {device.name} has "
            f"{device.host_memory_bytes:,}, of which {HOST_SPARE_BYTES:,} are left alone",
            stage="WEIGHTS",
            needed_bytes=needed_bytes,
            host_memory_bytes=device.host_memory_bytes,
        )


def _describe_recomputation(given: Hyperparameters, trainer: str) -> str:
    """As far as it tells runs apart before their data is known."""
    if trainer == FAST and given.gradient_checkpointing is None:
        return "as-needed"
    return "recomputed" if given.gradient_checkpointing else "kept"


def _find_optimizer(given: Hyperparameters, device: Device, versions: Mapping[str, str]) -> OptimizerEntry:
    entry = optimizers.REGISTRY.get(given.optimizer.name or "adamw")
    if entry is None:
        known = ", ".join(optimizers.REGISTRY)
        raise refuse_user(
            "INVALID_FIELD",
            f"the catalog has no optimizer {given.optimizer.name!r}; it has {known}",
            field="hyperparameters.optimizer.name",
        )
    if device.type not in entry.devices:
        offered = ", ".join(name for name, other in optimizers.REGISTRY.items() if device.type in other.devices)
        raise unsupported(
            f"optimizer {entry.id!r} is not offered on {device.name}; there are {offered}", "optimizer.name", stage=""
        )
    missing = [name for name in entry.requires if versions and name not in versions]
    if missing:
        raise unsupported(f"optimizer {entry.id!r} needs {missing[0]}, which is not here", "optimizer.name", stage="")
    return entry


def _check_objective(given: Hyperparameters, method: MethodEntry) -> None:
    if given.objective != "dpo":
        return
    if not method.trains_adapter:
        raise refuse_user(
            "COMBINATION_NOT_ALLOWED",
            f"objective 'dpo' compares with the base, which training type {method.id!r} changes; it goes with "
            + ", ".join(entry.id for entry in methods.REGISTRY.values() if entry.trains_adapter),
            field="hyperparameters.objective",
        )
    if given.loss_on == "all":
        raise refuse_user(
            "COMBINATION_NOT_ALLOWED",
            "objective 'dpo' compares answers: loss_on can only be 'targets'",
            field="hyperparameters.loss_on",
        )


def _cover_layers(given: Hyperparameters, method: MethodEntry, base_model: BaseModel) -> tuple[LinearLayer, ...]:
    """Layers that get an adapter. Each name must match some: a wrong one among right ones would train less."""
    if not method.trains_adapter:
        return ()
    layers, names = base_model.linear_layers, given.lora.target_modules
    leaves = ", ".join(sorted({layer.leaf for layer in layers}))
    unmatched = [name for name in names if not any(_matches(layer, name) for layer in layers)]
    if unmatched or not layers:
        raise refuse_user(
            "TARGETS_MATCH_NOTHING",
            f"no linear layer is called {', '.join(unmatched)}; there are: {leaves or 'none'}",
            field="hyperparameters.lora.target_modules",
            stage="ADAPTER",
            unmatched=",".join(unmatched),
            available=leaves.replace(" ", ""),
        )
    return tuple(layer for layer in layers if not names or any(_matches(layer, name) for name in names))


def _matches(layer: LinearLayer, name: str) -> bool:
    return layer.path == name or layer.path.endswith(f".{name}")


def _check_lengths(given: Hyperparameters, base_model: BaseModel) -> None:
    limit = base_model.max_position_embeddings
    if given.max_length is not None and limit and given.max_length > limit:
        raise refuse_user(
            "INVALID_FIELD",
            f"max_length is {given.max_length}, and the model has positions for {limit} tokens",
            field="hyperparameters.max_length",
        )
    micro = given.batch.micro_batch_examples
    examples = given.batch.examples or DEFAULT_BATCH_EXAMPLES
    if micro is not None and given.batch.tokens is None and micro > examples:
        raise refuse_user(
            "INVALID_FIELD",
            f"a forward pass of {micro} examples is more than a step of {examples}",
            field="hyperparameters.batch.micro_batch_examples",
        )


def _check_datasets(spec: TrainingSpec, base_model: BaseModel) -> None:
    template = spec.hyperparameters.chat_template
    if template and template not in templates.REGISTRY:
        raise refuse_user(
            "INVALID_FIELD",
            f"the catalog has no chat template {template!r}; it has {', '.join(templates.REGISTRY)}",
            field="hyperparameters.chat_template",
        )
    # By content: the same rows registered under two names are the same rows.
    trained = {
        content_of(spec.find_dataset(dataset.dataset_id)): dataset.dataset_id
        for trait in spec.traits
        for dataset in trait.datasets
    }
    for trait in spec.traits:
        held_out = trait.held_out_dataset_ids
        both = [dataset_id for dataset_id in held_out if content_of(spec.find_dataset(dataset_id)) in trained]
        if both or len(set(held_out)) < len(held_out):
            why = "a held-out dataset is named twice"
            if both:
                other = trained[content_of(spec.find_dataset(min(both)))]
                same = "" if min(both) in trained.values() else f": dataset {other} has the same rows"
                why = f"dataset {min(both)} is trained on and held out{same}"
            raise refuse_user(
                "INVALID_FIELD", f"trait {trait.trait_type!r}: {why}", field="traits.held_out_dataset_ids"
            )
        for dataset_id in (*(dataset.dataset_id for dataset in trait.datasets), *held_out):
            reference = spec.find_dataset(dataset_id)
            entry = dataset_formats.REGISTRY.get(reference.format)
            if entry is None:
                raise refuse_user(
                    "DATASET_FORMAT_UNKNOWN",
                    f"dataset {dataset_id} has format {reference.format!r}; the catalog has "
                    + ", ".join(dataset_formats.REGISTRY),
                    field="datasets",
                    dataset_id=dataset_id,
                )
            if entry.is_preference != (spec.hyperparameters.objective == "dpo"):
                raise refuse_user(
                    "COMBINATION_NOT_ALLOWED",
                    f"dataset {dataset_id} has preference pairs, which are for objective 'dpo': set "
                    "hyperparameters.objective to 'dpo'"
                    if entry.is_preference
                    else f"dataset {dataset_id} has format {entry.id!r}, and objective 'dpo' needs preference pairs in "
                    "every dataset, also in those held out: leave the dataset out, or set hyperparameters.objective to "
                    "'sft'",
                    field="hyperparameters.objective",
                    dataset_id=dataset_id,
                )
            if entry.needs_chat_template and not (template or base_model.has_chat_template):
                raise refuse_user(
                    "CHAT_TEMPLATE_MISSING",
                    f"dataset {dataset_id} is chat, and the base model has no chat template; name one of the catalog's "
                    f"in hyperparameters.chat_template: {', '.join(templates.REGISTRY)}",
                    field="hyperparameters.chat_template",
                    stage="TOKENIZER",
                    dataset_id=dataset_id,
                    available=",".join(templates.REGISTRY),
                )
