"""Hyper-parameters with every default applied and every range checked. Holds no two options against each other.

The defaults and ranges are those that `training_spec.proto` declares; a contract test holds the two together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpu_service.catalog.methods.entry import MethodEntry
from gpu_service.catalog.quantization.entry import QuantizationEntry
from gpu_service.domain.device import Device
from gpu_service.domain.errors import Refusal, refuse_user
from gpu_service.domain.recomputation import Recomputation
from gpu_service.domain.spec import Batch, Hyperparameters, Mix, decode_message

DEFAULT_MAX_LENGTH = 2048
DEFAULT_BATCH_EXAMPLES = 8
DEFAULT_LORA_RANK = 16
# How quantized weights are held beside their 4 bits: restored once and kept, or at each use.
RESIDENT, STREAMED = "resident", "streamed"
# What frozen weights are multiplied in: the compute type, or 8 bits.
STANDARD, FP8 = "standard", "fp8"
# How the fast path trains every weight: in float32, or in little memory.
LOW = "low"


@dataclass(frozen=True, kw_only=True)
class ResolvedQuantization:
    method: str
    double_quantization: bool
    compute_dtype: str


@dataclass(frozen=True, kw_only=True)
class ResolvedLora:
    """`target_modules` are names of linear layers, as `peft` takes them; never empty."""

    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ResolvedBatch:
    """What makes a step, and a forward pass. One of `examples` and `tokens` is set.

    `micro_batch_examples` and `micro_batch_tokens` None are no limit of that kind.
    """

    examples: int | None = None
    tokens: int | None = None
    micro_batch_examples: int | None = None
    micro_batch_tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """`Batch` as proto JSON: int64 are strings, what is unset is left out."""
        values: dict[str, Any] = {
            "examples": self.examples,
            "tokens": None if self.tokens is None else str(self.tokens),
            "micro_batch_examples": self.micro_batch_examples,
            "micro_batch_tokens": None if self.micro_batch_tokens is None else str(self.micro_batch_tokens),
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ResolvedOptimizer:
    name: str
    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    max_gradient_norm: float


@dataclass(frozen=True, kw_only=True)
class ResolvedSchedule:
    name: str
    warmup_steps: int


@dataclass(frozen=True, kw_only=True)
class ResolvedDpo:
    beta: float
    label_smoothing: float


@dataclass(frozen=True, kw_only=True)
class ResolvedHyperparameters:
    """Nothing is unset but what has a meaning unset.

    `lora` is None for `full`, `dpo` for any objective but `dpo`. One of `num_steps` and `num_epochs` is set, as the
    project chose; the plan says both.
    `chat_template` None is the base model's own; `max_duration_seconds` None is no limit.
    """

    quantization: ResolvedQuantization
    batch: ResolvedBatch
    max_length: int
    optimizer: ResolvedOptimizer
    schedule: ResolvedSchedule
    seed: int = 0
    save_every_steps: int = 0
    evaluate_every_steps: int = 0
    loss_on: str = "targets"
    keep_checkpoints: int = 1
    keep_best_checkpoint: bool = True
    gradient_checkpointing: bool = False
    objective: str = "sft"
    dpo: ResolvedDpo | None = None
    non_finite_policy: str = "stop"
    warn_after_rises: int = 3
    exports: tuple[str, ...] = ()
    max_export_logit_difference: float = 1.0
    # `fast` or `reference`; a plan's resolved settings are never `auto`.
    trainer: str = "auto"
    # On the fast path alone: what is recomputed, and how quantized weights are held (`resident` or `streamed`).
    recomputation: Recomputation | None = None
    base_weights: str | None = None
    compute: str = STANDARD
    # Of `full` on the fast path alone: `standard` or `low`.
    full_memory: str | None = None
    lora: ResolvedLora | None = None
    num_steps: int | None = None
    num_epochs: float | None = None
    chat_template: str | None = None
    max_duration_seconds: int | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ResolvedHyperparameters":
        """Reads `resolved` of a plan's JSON back. Raises `Refusal` INVALID_FIELD when it is not one."""
        try:
            resolved: ResolvedHyperparameters = decode_message(cls, value, "resolved")
        except TypeError as error:  # a field without a default is missing
            raise refuse_user("INVALID_FIELD", f"the plan's hyper-parameters are not whole: {error}") from error
        return resolved

    def to_json(self) -> dict[str, Any]:
        """`Hyperparameters` as proto JSON with proto names."""
        value: dict[str, Any] = {
            "quantization": vars(self.quantization).copy(),
            "batch": self.batch.to_json(),
            "max_length": self.max_length,
            "optimizer": vars(self.optimizer).copy(),
            "schedule": vars(self.schedule).copy(),
            "seed": str(self.seed),
            "save_every_steps": self.save_every_steps,
            "evaluate_every_steps": self.evaluate_every_steps,
            "loss_on": self.loss_on,
            "gradient_checkpointing": self.gradient_checkpointing,
            "keep_checkpoints": self.keep_checkpoints,
            "keep_best_checkpoint": self.keep_best_checkpoint,
            "objective": self.objective,
            "non_finite_policy": self.non_finite_policy,
            "warn_after_rises": self.warn_after_rises,
            "exports": list(self.exports),
            "max_export_logit_difference": self.max_export_logit_difference,
            "trainer": self.trainer,
            "compute": self.compute,
        }
        if self.dpo is not None:
            value["dpo"] = vars(self.dpo).copy()
        if self.lora is not None:
            value["lora"] = {**vars(self.lora), "target_modules": list(self.lora.target_modules)}
        if self.recomputation is not None:
            value["recomputation"] = vars(self.recomputation).copy()
        for name in ("num_steps", "num_epochs", "chat_template", "base_weights", "full_memory"):
            if getattr(self, name) is not None:
                value[name] = getattr(self, name)
        if self.max_duration_seconds is not None:
            value["max_duration_seconds"] = str(self.max_duration_seconds)
        return value


@dataclass(frozen=True, kw_only=True)
class ResolvedMix:
    """`total`, counted in `unit`; None is the largest that the policy allows."""

    unit: str
    total: int | None
    policy: str
    max_repeats: int


def resolve_lora(given: Hyperparameters, target_modules: tuple[str, ...]) -> ResolvedLora:
    """The adapter with every default applied; `target_modules` are the layers that it covers."""
    rank = _or(given.lora.rank, DEFAULT_LORA_RANK)
    return ResolvedLora(
        rank=rank,
        alpha=_or(given.lora.alpha, 2.0 * rank),
        dropout=_or(given.lora.dropout, 0.0),
        target_modules=target_modules,
    )


def apply_defaults(
    given: Hyperparameters,
    *,
    method: MethodEntry,
    quantization: QuantizationEntry,
    target_modules: tuple[str, ...],
    device: Device,
    length_limit: int,
    num_steps: int,
) -> ResolvedHyperparameters:
    """Fills in what is unset. `length_limit` 0 is no known limit; `num_steps` (0: not known) is for the warm-up."""
    check_ranges(given)
    objective = _or(given.objective, "sft")
    return ResolvedHyperparameters(
        quantization=resolve_quantization(given, quantization, device),
        lora=resolve_lora(given, target_modules) if method.trains_adapter else None,
        batch=resolve_batch(given.batch),
        max_length=default_max_length(given, length_limit),
        optimizer=ResolvedOptimizer(
            name=_or(given.optimizer.name, "adamw"),
            learning_rate=_or(given.optimizer.learning_rate, method.default_learning_rate),
            weight_decay=_or(given.optimizer.weight_decay, 0.0),
            beta1=_or(given.optimizer.beta1, 0.9),
            beta2=_or(given.optimizer.beta2, 0.999),
            epsilon=_or(given.optimizer.epsilon, 1e-8),
            max_gradient_norm=_or(given.optimizer.max_gradient_norm, 1.0),
        ),
        schedule=ResolvedSchedule(
            name=_or(given.schedule.name, "linear"),
            warmup_steps=_or(given.schedule.warmup_steps, default_warmup_steps(num_steps)),
        ),
        num_steps=given.num_steps,
        num_epochs=1.0 if given.num_steps is None and given.num_epochs is None else given.num_epochs,
        seed=_or(given.seed, 0),
        save_every_steps=_or(given.save_every_steps, 100),
        evaluate_every_steps=_or(given.evaluate_every_steps, 0),
        max_duration_seconds=given.max_duration_seconds,
        loss_on=_or(given.loss_on, "targets"),
        chat_template=given.chat_template or None,
        gradient_checkpointing=_or(given.gradient_checkpointing, False),
        keep_checkpoints=_or(given.keep_checkpoints, 2),
        keep_best_checkpoint=_or(given.keep_best_checkpoint, True),
        objective=objective,
        dpo=ResolvedDpo(beta=_or(given.dpo.beta, 0.1), label_smoothing=_or(given.dpo.label_smoothing, 0.0))
        if objective == "dpo"
        else None,
        non_finite_policy=_or(given.non_finite_policy, "stop"),
        warn_after_rises=_or(given.warn_after_rises, 3),
        exports=given.exports,
        max_export_logit_difference=_or(given.max_export_logit_difference, 1.0),
        trainer=_or(given.trainer, "auto"),
        compute=_or(given.compute, STANDARD),
        full_memory=given.full_memory,
    )


def resolve_quantization(
    given: Hyperparameters, quantization: QuantizationEntry, device: Device
) -> ResolvedQuantization:
    """How the base is held on this device."""
    return ResolvedQuantization(
        method=quantization.id,
        double_quantization=_or(given.quantization.double_quantization, True)
        and quantization.supports_double_quantization,
        compute_dtype=_or(given.quantization.compute_dtype, "bfloat16" if device.has_bfloat16 else "float32"),
    )


def default_max_length(given: Hyperparameters, length_limit: int) -> int:
    """The max_length that was given, else 2,048 or the model's limit. `length_limit` 0 is no known limit."""
    if given.max_length is not None:
        return given.max_length
    return min(DEFAULT_MAX_LENGTH, length_limit or DEFAULT_MAX_LENGTH)


def resolve_batch(batch: Batch) -> ResolvedBatch:
    """The batch with its defaults: 8 examples a step, in one forward pass."""
    examples = None if batch.tokens is not None else _or(batch.examples, DEFAULT_BATCH_EXAMPLES)
    return ResolvedBatch(
        examples=examples,
        tokens=batch.tokens,
        micro_batch_examples=_or(batch.micro_batch_examples, examples),
        micro_batch_tokens=batch.micro_batch_tokens,
    )


def resolve_mix(mix: Mix) -> ResolvedMix:
    """The mix with its defaults. Raises `Refusal` INVALID_FIELD."""
    _check_choice("mix.unit", mix.unit, ("examples", "tokens", "target_tokens"))
    _check_choice("mix.policy", mix.policy, ("shrink", "repeat", "fail"))
    _check_number("mix.total", mix.total, 1, 1e12)
    _check_number("mix.max_repeats", mix.max_repeats, 1, 1000)
    return ResolvedMix(
        unit=_or(mix.unit, "examples"),
        total=mix.total,
        policy=_or(mix.policy, "shrink"),
        max_repeats=_or(mix.max_repeats, 1),
    )


def default_warmup_steps(num_steps: int) -> int:
    """3 % of the steps, rounded up."""
    return -(-3 * num_steps // 100)


# Field, smallest, largest legal number; a smallest that is itself illegal stands in _ABOVE.
RANGES: Mapping[str, tuple[float, float]] = {
    "lora.rank": (1, 1024),
    "lora.alpha": (0, 65536),
    "lora.dropout": (0, 0.9),
    "batch.examples": (1, 65536),
    "batch.tokens": (8, 1e8),
    "batch.micro_batch_examples": (1, 65536),
    "batch.micro_batch_tokens": (8, 1e8),
    "max_length": (8, 1048576),
    "optimizer.learning_rate": (0, 10),
    "optimizer.weight_decay": (0, 10),
    "optimizer.beta1": (0, 0.999999),
    "optimizer.beta2": (0, 0.999999),
    "optimizer.epsilon": (0, 1),
    "optimizer.max_gradient_norm": (0, 1e6),
    "schedule.warmup_steps": (0, 1e9),
    "num_steps": (1, 1e9),
    "num_epochs": (0, 1e6),
    "seed": (0, 2**63 - 1),
    "save_every_steps": (0, 1e9),
    "evaluate_every_steps": (0, 1e9),
    "max_duration_seconds": (1, 31536000),
    "keep_checkpoints": (1, 1000),
    "warn_after_rises": (0, 1000),
    "dpo.beta": (0, 100),
    "dpo.label_smoothing": (0, 0.49),
    "max_export_logit_difference": (0, 1000),
    "recomputation.full_layers": (0, 1000),
    "recomputation.feed_forward_layers": (0, 1000),
    "recomputation.elementwise_layers": (0, 1000),
    "recomputation.feed_forward_slices": (1, 64),
}
ABOVE = frozenset(
    {
        "lora.alpha",
        "optimizer.learning_rate",
        "optimizer.epsilon",
        "num_epochs",
        "dpo.beta",
        "max_export_logit_difference",
    }
)
CHOICES: Mapping[str, tuple[str, ...]] = {
    "quantization.compute_dtype": ("bfloat16", "float16", "float32"),
    "schedule.name": ("constant", "linear", "cosine"),
    "loss_on": ("targets", "all"),
    "objective": ("sft", "dpo"),
    "non_finite_policy": ("stop", "skip"),
    "trainer": ("auto", "fast", "reference"),
    "base_weights": ("auto", RESIDENT, STREAMED),
    "compute": (STANDARD, FP8),
    "full_memory": (STANDARD, LOW),
}


def check_ranges(given: Hyperparameters) -> None:
    """Refuses a number outside its range and a word that is none of its choices, INVALID_FIELD naming the field."""
    for name, (smallest, largest) in RANGES.items():
        _check_number(f"hyperparameters.{name}", _find(given, name), smallest, largest, above=name in ABOVE)
    for name, choices in CHOICES.items():
        _check_choice(f"hyperparameters.{name}", _find(given, name), choices)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _find(given: object, path: str) -> Any:
    for name in path.split("."):
        given = getattr(given, name)
    return given


def _check_number(field: str, value: float | None, smallest: float, largest: float, *, above: bool = False) -> None:
    if value is None or (smallest <= value <= largest and not (above and value == smallest)):
        return
    raise _out_of_range(field, value, f"{'above' if above else 'at least'} {smallest:g} and at most {largest:g}")


def _check_choice(field: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise _out_of_range(field, value, f"one of {', '.join(choices)}")


def _out_of_range(field: str, value: object, wanted: str) -> Refusal:
    return refuse_user("INVALID_FIELD", f"{field} is {value}, but must be {wanted}", field=field)
