"""Export formats by id: in which other forms what was trained can be had."""

from collections.abc import Mapping
from types import MappingProxyType

from gpu_service.catalog.exports import gguf, merged
from gpu_service.catalog.exports.entry import ExportEntry

REGISTRY: Mapping[str, ExportEntry] = MappingProxyType(
    {
        "merged": merged.ENTRY,
        "gguf": gguf.ENTRY,
    }
)
