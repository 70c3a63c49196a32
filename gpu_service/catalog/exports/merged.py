"""The catalog's `merged`: the base with the adapter in it, in 16 bits."""

from gpu_service.catalog.exports.entry import ExportEntry

ENTRY = ExportEntry(
    id="merged",
    description="base and adapter as one model in 16 bits, as safetensors",
    builder="gpu_service.engine.builders.exports.merged",
)
