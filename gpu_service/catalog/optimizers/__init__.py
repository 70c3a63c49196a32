"""Optimizers by id."""

from collections.abc import Mapping
from types import MappingProxyType

from gpu_service.catalog.optimizers import adamw
from gpu_service.catalog.optimizers.entry import OptimizerEntry

REGISTRY: Mapping[str, OptimizerEntry] = MappingProxyType(
    {
        "adamw": adamw.ENTRY,
    }
)
