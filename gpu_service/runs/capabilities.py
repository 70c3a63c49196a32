"""What this node is and can do: its catalog as plain facts, its models, devices, versions and refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from gpu_service.catalog import datasets, exports, families, methods, optimizers, quantization
from gpu_service.catalog.base_models import BaseModel
from gpu_service.devices import Device
from gpu_service.domain.errors import Refusal
from gpu_service.runs.admission import Admission
from gpu_service.runs.models import ModelShelf


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A catalog entry; `details` are its further facts as text."""

    id: str
    description: str
    details: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """Everything that GetCapabilities tells."""

    devices: Sequence[Device]
    models: Sequence[BaseModel]
    quantizations: Sequence[Entry]
    training_types: Sequence[Entry]
    dataset_formats: Sequence[Entry]
    model_types: Sequence[Entry]
    # Those that some device of this node can go on with.
    optimizers: Sequence[Entry]
    # Those that are written; a format that is known and not offered is none.
    exports: Sequence[Entry]
    versions: Mapping[str, str]
    problem: Refusal | None


class CapabilityReader:
    """Reads them anew each time: models and free memory change."""

    def __init__(self, *, admission: Admission, models: ModelShelf, versions: Mapping[str, str]) -> None:
        self._admission = admission
        self._models = models
        self._versions = versions

    async def read(self) -> Capabilities:
        devices = await self._admission.devices()
        types = {device.type for device in devices}
        return Capabilities(
            devices=devices,
            models=await self._models.list_models(),
            quantizations=_entries(quantization.REGISTRY),
            training_types=_entries(methods.REGISTRY),
            dataset_formats=_entries(datasets.REGISTRY),
            model_types=_entries(families.REGISTRY),
            optimizers=_entries(
                {name: entry for name, entry in optimizers.REGISTRY.items() if types.intersection(entry.devices)}
            ),
            exports=_entries({name: entry for name, entry in exports.REGISTRY.items() if not entry.not_offered}),
            versions=self._versions,
            problem=self._admission.problem(),
        )


def _entries(registry: Mapping[str, Any]) -> list[Entry]:
    return [
        Entry(
            id=entry.id,
            description=entry.description,
            details={
                field.name: text
                for field in fields(entry)
                # Where its builder lies is nobody's business but the node's.
                if field.name not in ("id", "description", "builder") and (text := _text(getattr(entry, field.name)))
            },
        )
        for entry in registry.values()
    ]


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)
