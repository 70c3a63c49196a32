"""Use cases of models: what the nodes have, by what they last reported. Control keeps no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from control_service.app.ports import NodeDirectory
from control_service.domain.node import CatalogEntry, NodeModel


@dataclass(frozen=True, kw_only=True)
class ModelView:
    """A base model and the nodes that have it."""

    model: NodeModel
    nodes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelTypeView:
    """A model family and the nodes whose catalogs have it."""

    entry: CatalogEntry
    nodes: tuple[str, ...]

    @property
    def config_types(self) -> tuple[str, ...]:
        """Config types that the family accepts."""
        return tuple(part for part in self.entry.details.get("config_types", "").replace(",", " ").split() if part)


def list_models(*, nodes: NodeDirectory, after_name: str = "", limit: int = 50) -> Sequence[ModelView]:
    """Models of all nodes by name, after a name; at most `limit`."""
    raise NotImplementedError


def get_model(name: str, *, nodes: NodeDirectory) -> ModelView:
    """One model. NotFound MODEL_NOT_FOUND with `available_models`."""
    raise NotImplementedError


def list_model_types(*, nodes: NodeDirectory) -> Sequence[ModelTypeView]:
    """Model families by id."""
    raise NotImplementedError
