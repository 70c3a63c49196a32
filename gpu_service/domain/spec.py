"""The training spec as frozen values: decodes proto JSON strictly. Applies no default, checks no range."""

import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from gpu_service.domain.errors import refuse_user


@dataclass(frozen=True, kw_only=True)
class TraitDataset:
    dataset_id: int = 0
    percentage: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Trait:
    trait_type: str = ""
    weight: float | None = None
    datasets: tuple[TraitDataset, ...] = ()
    held_out_dataset_ids: tuple[int, ...] = ()
    held_out_fraction: float | None = None


@dataclass(frozen=True, kw_only=True)
class Mix:
    unit: str | None = None
    total: int | None = None
    policy: str | None = None
    max_repeats: int | None = None


@dataclass(frozen=True, kw_only=True)
class Quantization:
    method: str | None = None
    double_quantization: bool | None = None
    compute_dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Lora:
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """At most one of `examples` and `tokens` is set."""

    examples: int | None = None
    tokens: int | None = None
    micro_batch_examples: int | None = None
    micro_batch_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    name: str | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    epsilon: float | None = None
    max_gradient_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    name: str | None = None
    warmup_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class Dpo:
    beta: float | None = None
    label_smoothing: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    full_layers: int | None = None
    feed_forward_layers: int | None = None
    elementwise_layers: int | None = None
    offload: bool | None = None
    feed_forward_slices: int | None = None


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """At most one of `num_steps` and `num_epochs` is set."""

    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    batch: Batch = Batch()
    max_length: int | None = None
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    num_steps: int | None = None
    num_epochs: float | None = None
    seed: int | None = None
    save_every_steps: int | None = None
    evaluate_every_steps: int | None = None
    max_duration_seconds: int | None = None
    loss_on: str | None = None
    chat_template: str | None = None
    gradient_checkpointing: bool | None = None
    keep_checkpoints: int | None = None
    keep_best_checkpoint: bool | None = None
    objective: str | None = None
    dpo: Dpo = Dpo()
    non_finite_policy: str | None = None
    warn_after_rises: int | None = None
    exports: tuple[str, ...] = ()
    max_export_logit_difference: float | None = None
    trainer: str | None = None
    recomputation: Recomputation = Recomputation()
    base_weights: str | None = None
    compute: str | None = None
    full_memory: str | None = None


@dataclass(frozen=True, kw_only=True)
class SamplePrompt:
    trait_type: str = ""
    prompt: str = ""
    max_new_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetReference:
    dataset_id: int = 0
    sha256: str = ""
    size_bytes: int = 0
    format: str = ""
    num_examples: int = 0


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    path: str = ""
    sha256: str = ""
    size_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class StartFrom:
    job_id: str = ""
    name: str = ""
    files: tuple[StoredFile, ...] = ()
    # Of the earlier job; empty: not told.
    training_type: str = ""
    lora: Lora = Lora()


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """What a job trains by. `None` and empty mean unset; `domain.plan.resolve` applies the documented defaults."""

    base_model: str = ""
    model_type: str = ""
    training_type: str = ""
    traits: tuple[Trait, ...] = ()
    mix: Mix = Mix()
    hyperparameters: Hyperparameters = Hyperparameters()
    sample_prompts: tuple[SamplePrompt, ...] = ()
    datasets: tuple[DatasetReference, ...] = ()
    start_from: StartFrom | None = None
    # Empty is `train`.
    task: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TrainingSpec":
        """Decodes `TrainingSpec` as proto JSON with proto (snake_case) names: int64 are strings, doubles may be names.

        Raises `Refusal` INVALID_FIELD with the field's path: an unknown name, a wrong type, a number not finite.
        """
        spec: TrainingSpec = decode_message(cls, value, "")
        given = spec.hyperparameters
        if given.num_steps is not None and given.num_epochs is not None:
            raise refuse_user(
                "INVALID_FIELD", "num_steps and num_epochs exclude each other", field="hyperparameters.num_steps"
            )
        if given.batch.examples is not None and given.batch.tokens is not None:
            raise refuse_user(
                "INVALID_FIELD", "examples and tokens exclude each other", field="hyperparameters.batch.tokens"
            )
        return spec

    @property
    def contents(self) -> tuple[str, ...]:
        """SHA-256 of everything that must be on a node before a run: datasets, and what an earlier job left."""
        start = self.start_from
        files = () if start is None else start.files
        return (*(dataset.sha256 for dataset in self.datasets), *(file.sha256 for file in files))

    def find_dataset(self, dataset_id: int) -> DatasetReference:
        """The reference with this id. Raises `Refusal` DATASET_NOT_FOUND."""
        for reference in self.datasets:
            if reference.dataset_id == dataset_id:
                return reference
        raise refuse_user(
            "DATASET_NOT_FOUND", f"the spec carries no dataset {dataset_id}", field="datasets", dataset_id=dataset_id
        )


def spec_digest(spec: Mapping[str, Any]) -> str:
    """Lower-case hex SHA-256 over the spec's canonical JSON: keys sorted, no white space, UTF-8 as it is."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def decode_message(cls: type, value: object, path: str) -> Any:
    """Decodes one dataclass from proto JSON; `path` names it in refusals. Raises `Refusal` INVALID_FIELD."""
    if not isinstance(value, Mapping):
        raise _wrong(path, "an object", value)
    hints = _hints(cls)
    names = {field.name for field in fields(cls)}
    decoded = {}
    for name, item in value.items():
        inner = f"{path}.{name}" if path else str(name)
        if name not in names:
            raise refuse_user("INVALID_FIELD", f"{inner} is no field of the spec", field=inner)
        if item is not None:  # null means unset in proto JSON
            decoded[name] = _decode(hints[name], item, inner)
    return cls(**decoded)


def _decode(hint: Any, value: object, path: str) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(part for part in hint.__args__ if part is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise _wrong(path, "a list", value)
        item_hint = typing.get_args(hint)[0]
        return tuple(_decode(item_hint, item, f"{path}[{index}]") for index, item in enumerate(value))
    if is_dataclass(hint):
        return decode_message(typing.cast(type, hint), value, path)
    return _DECODERS[hint](value, path)


def _decode_int(value: object, path: str) -> int:
    if isinstance(value, str):
        digits = value.removeprefix("-")
        if digits.isascii() and digits.isdecimal() and len(digits) <= 20:
            return int(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    elif isinstance(value, float) and value.is_integer():
        return int(value)
    raise _wrong(path, "a whole number", value)


def _decode_float(value: object, path: str) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _wrong(path, "a number", value) from None
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # a whole number that no double can hold
            number = math.inf
        if math.isfinite(number):
            return number
    raise _wrong(path, "a finite number", value)


def _decode_str(value: object, path: str) -> str:
    if isinstance(value, str):
        return value
    raise _wrong(path, "text", value)


def _decode_bool(value: object, path: str) -> bool:
    if isinstance(value, bool):
        return value
    raise _wrong(path, "true or false", value)


_DECODERS: dict[type, Any] = {int: _decode_int, float: _decode_float, str: _decode_str, bool: _decode_bool}


def _wrong(path: str, wanted: str, value: object) -> Exception:
    return refuse_user("INVALID_FIELD", f"{path or 'spec'} must be {wanted}, not {str(value)[:80]!r}", field=path)
