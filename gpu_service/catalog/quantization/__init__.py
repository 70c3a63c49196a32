"""Quantizations by id: how the frozen base is held."""

from collections.abc import Mapping
from types import MappingProxyType

from gpu_service.catalog.quantization import fp4, int8, nf4, none
from gpu_service.catalog.quantization.entry import QuantizationEntry

REGISTRY: Mapping[str, QuantizationEntry] = MappingProxyType(
    {
        "nf4": nf4.ENTRY,
        "fp4": fp4.ENTRY,
        "int8": int8.ENTRY,
        "none": none.ENTRY,
    }
)
