"""Optimizers by id."""

from collections.abc import Mapping
from types import MappingProxyType

from gpu_service.catalog.optimizers import adamw, adamw_8bit, paged_adamw_8bit
from gpu_service.catalog.optimizers.entry import OptimizerEntry

REGISTRY: Mapping[str, OptimizerEntry] = MappingProxyType(
    {
        "adamw": adamw.ENTRY,
        "adamw-8bit": adamw_8bit.ENTRY,
        "paged-adamw-8bit": paged_adamw_8bit.ENTRY,
    }
)
