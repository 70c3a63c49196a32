"""What planning came to, typed, and as the wire's `Plan`. Decides nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpu_service.catalog.base_models import BaseModel, LinearLayer
from gpu_service.catalog.families.entry import FamilyEntry
from gpu_service.catalog.methods.entry import MethodEntry
from gpu_service.catalog.optimizers.entry import OptimizerEntry
from gpu_service.catalog.quantization.entry import QuantizationEntry
from gpu_service.domain.defaults import ResolvedHyperparameters, ResolvedMix, ResolvedQuantization
from gpu_service.domain.device import Device
from gpu_service.domain.memory_estimate import MemoryEstimate
from gpu_service.domain.mix import MixSource


@dataclass(frozen=True, kw_only=True)
class DatasetPlan:
    """What one dataset of one trait gives per epoch. At level CHECK tokens are 0 and counts are upper bounds."""

    trait_type: str
    dataset_id: int
    share: float = 0.0
    num_available: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    num_repeats: int = 0
    num_truncated: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    held_out: bool = False
    # Over the whole run; 0 at level CHECK, and for what is held out.
    run_examples: int = 0
    run_tokens: int = 0
    run_target_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """`DatasetPlan` as proto JSON."""
        return {
            "trait_type": self.trait_type,
            "dataset_id": self.dataset_id,
            "share": self.share,
            "num_available": str(self.num_available),
            "num_examples": str(self.num_examples),
            "num_tokens": str(self.num_tokens),
            "num_target_tokens": str(self.num_target_tokens),
            "num_repeats": self.num_repeats,
            "num_truncated": str(self.num_truncated),
            "dropped": {reason: str(count) for reason, count in sorted(self.dropped.items())},
            "held_out": self.held_out,
            "run_examples": str(self.run_examples),
            "run_tokens": str(self.run_tokens),
            "run_target_tokens": str(self.run_target_tokens),
        }


@dataclass(frozen=True, kw_only=True)
class HeldBase:
    """A base model as a device holds it for a training type."""

    base_model: BaseModel
    family: FamilyEntry
    method: MethodEntry
    quantization: ResolvedQuantization


@dataclass(frozen=True, kw_only=True)
class CheckedPlan:
    """A spec that can be trained, with everything resolved. `level` is `CHECK` or `EXACT`.

    At CHECK the counts and steps are upper bounds from the registered number of examples, and there is no data digest.
    """

    level: str
    base_model: BaseModel
    device: Device
    family: FamilyEntry
    method: MethodEntry
    quantization: QuantizationEntry
    optimizer: OptimizerEntry
    hyperparameters: ResolvedHyperparameters
    mix: ResolvedMix
    # Training sources, ordered by trait and dataset id.
    sources: tuple[MixSource, ...]
    # The same in the same order, then those held out, ordered likewise.
    datasets: tuple[DatasetPlan, ...]
    config_type: str
    covered_layers: tuple[LinearLayer, ...]
    num_trainable_parameters: int
    num_epochs: float
    num_steps: int
    total_examples: int
    memory: MemoryEstimate
    # Why resolved.trainer is what it is; empty where nothing is trained.
    trainer_reason: str = ""
    # Who quantizes the base; empty where nothing is quantized.
    quantizer: str = ""
    # Under what a node keeps its measurements of such runs.
    kind_of_run: str = ""
    total_tokens: int = 0
    total_target_tokens: int = 0
    # At level EXACT; `fill` is 0 where a batch counts examples.
    fill: float = 0.0
    longest_example_tokens: int = 0
    largest_step_tokens: int = 0
    num_duplicates: int = 0
    data_digest: str = ""
    spec_digest: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def longest_possible_tokens(self) -> int:
        """The most tokens that an example can have: a preference pair has two sequences of max_length."""
        return self.hyperparameters.max_length * (2 if self.hyperparameters.objective == "dpo" else 1)

    @property
    def examples_per_epoch(self) -> int:
        return sum(dataset.num_examples for dataset in self.datasets if not dataset.held_out)

    def to_json(self) -> dict[str, Any]:
        """`Plan` as proto JSON with proto names; int64 are strings."""
        training = [dataset for dataset in self.datasets if not dataset.held_out]
        return {
            "level": f"PLAN_LEVEL_{self.level}",
            "resolved": self.hyperparameters.to_json(),
            "training_type": self.method.id,
            "model_type": self.family.id,
            "config_type": self.config_type,
            "weights_digest": self.base_model.weights_digest,
            "datasets": [dataset.to_json() for dataset in self.datasets],
            "examples_per_epoch": str(self.examples_per_epoch),
            "tokens_per_epoch": str(sum(dataset.num_tokens for dataset in training)),
            "target_tokens_per_epoch": str(sum(dataset.num_target_tokens for dataset in training)),
            "num_epochs": self.num_epochs,
            "num_steps": str(self.num_steps),
            "total_examples": str(self.total_examples),
            "total_tokens": str(self.total_tokens),
            "total_target_tokens": str(self.total_target_tokens),
            "num_covered_linears": len(self.covered_layers),
            "num_linears": len(self.base_model.linear_layers),
            "num_trainable_parameters": str(self.num_trainable_parameters),
            "num_parameters": str(self.base_model.num_parameters),
            "memory": self.memory.to_json(),
            "data_digest": self.data_digest,
            "spec_digest": self.spec_digest,
            "warnings": list(self.warnings),
            "device": self.device.name,
            "fill": self.fill,
            "longest_example_tokens": str(self.longest_example_tokens),
            "largest_step_tokens": str(self.largest_step_tokens),
            "num_duplicates": str(self.num_duplicates),
            "trainer_reason": self.trainer_reason,
            "quantizer": self.quantizer,
        }
