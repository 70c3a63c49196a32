"""Use cases of models: what the nodes have, by what they last reported. Control keeps no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from control_service.app.ports import NodeDirectory
from control_service.domain.errors import NotFound
from control_service.domain.node import CatalogEntry, NodeModel, NodeView


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
    views = models_by_name(nodes.views())
    return [views[name] for name in sorted(views) if name > after_name][:limit]


def get_model(name: str, *, nodes: NodeDirectory) -> ModelView:
    """One model. NotFound MODEL_NOT_FOUND with `available_models`."""
    views = models_by_name(nodes.views())
    if name not in views:
        available = ", ".join(sorted(views)) or "none"
        raise NotFound(
            "MODEL_NOT_FOUND",
            f"no node has the model {name}; there are: {available}",
            details={"model": name, "available_models": ",".join(sorted(views))},
        )
    return views[name]


def list_model_types(*, nodes: NodeDirectory) -> Sequence[ModelTypeView]:
    """Model families by id."""
    found: dict[str, ModelTypeView] = {}
    for view in _reachable(nodes.views()):
        for entry in view.capabilities.model_types if view.capabilities else ():
            earlier = found.get(entry.id)
            names = (*(earlier.nodes if earlier else ()), view.node.name)
            found[entry.id] = ModelTypeView(entry=earlier.entry if earlier else entry, nodes=names)
    return [found[name] for name in sorted(found)]


def models_by_name(views: Sequence[NodeView]) -> dict[str, ModelView]:
    """Models of the nodes that can be reached; where nodes differ, the first node's facts are given."""
    found: dict[str, ModelView] = {}
    for view in _reachable(views):
        for model in view.capabilities.models if view.capabilities else ():
            earlier = found.get(model.name)
            names = (*(earlier.nodes if earlier else ()), view.node.name)
            found[model.name] = ModelView(model=earlier.model if earlier else model, nodes=names)
    return found


def _reachable(views: Sequence[NodeView]) -> list[NodeView]:
    return [view for view in views if view.is_reachable]
