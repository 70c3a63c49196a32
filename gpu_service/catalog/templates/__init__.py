"""Chat templates by id, for bases that have none of their own; the one used is saved with the adapter."""

from collections.abc import Mapping
from types import MappingProxyType

from gpu_service.catalog.templates import chatml, plain_turns
from gpu_service.catalog.templates.entry import TemplateEntry

REGISTRY: Mapping[str, TemplateEntry] = MappingProxyType(
    {
        "chatml": chatml.ENTRY,
        "plain-turns": plain_turns.ENTRY,
    }
)
