"""What can be minimized, by the id that a project names. Each objective is a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from gpu_service.engine.training.objectives import dpo, sft
from gpu_service.engine.training.objectives.objective import Objective, Outcome
from tunesmith.common.v1 import training_spec_pb2

__all__ = ["OBJECTIVES", "Objective", "Outcome", "make_objective"]

OBJECTIVES: Mapping[str, Callable[[training_spec_pb2.Hyperparameters], Objective]] = MappingProxyType(
    {"sft": sft.build, "dpo": dpo.build}
)


def make_objective(settings: training_spec_pb2.Hyperparameters) -> Objective:
    """The objective of resolved hyper-parameters."""
    return OBJECTIVES[settings.objective or "sft"](settings)
