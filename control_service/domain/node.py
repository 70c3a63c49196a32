"""A node as control sees it: its record, what it last reported, and whether it is heard from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from control_service.domain.failure import Failure
from control_service.domain.run import ObservedRun


class NodeState(StrEnum):
    """How a node stands, by control's own monotonic clock."""

    CONNECTING = "CONNECTING"
    REACHABLE = "REACHABLE"
    UNREACHABLE = "UNREACHABLE"


@dataclass(frozen=True, kw_only=True)
class Node:
    """The stored record of a node. `draining` is the operator's wish; a node may also drain by itself."""

    name: str
    address: str
    draining: bool = False
    # Its runs are to checkpoint and go back to the queue.
    interrupt: bool = False
    # It came from the settings and goes with them; one that was registered stays.
    configured: bool = False
    create_time: datetime


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device. `index` is 0-based; -1 for the CPU."""

    index: int
    type: str
    name: str
    total_memory_bytes: int
    free_memory_bytes: int
    compute_capability: str = ""
    quarantine_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """An entry of a node's catalog. `details` are further facts, e.g. `config_types` -> `llama`."""

    id: str
    description: str
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NodeModel:
    """A base model on a node. `problem` is empty when it can be trained."""

    name: str
    config_type: str
    weights_digest: str
    size_bytes: int
    num_parameters: int
    vocabulary_size: int
    has_chat_template: bool
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeCapabilities:
    """What a node is and can do."""

    node_name: str
    instance_id: str
    devices: tuple[Device, ...] = ()
    models: tuple[NodeModel, ...] = ()
    quantizations: tuple[CatalogEntry, ...] = ()
    training_types: tuple[CatalogEntry, ...] = ()
    dataset_formats: tuple[CatalogEntry, ...] = ()
    model_types: tuple[CatalogEntry, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    problem: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """One message of a node's standing report stream."""

    node_name: str
    instance_id: str
    devices: tuple[Device, ...] = ()
    # Every run of this installation that was not released.
    runs: tuple[ObservedRun, ...] = ()
    accepting: bool = True
    draining: bool = False
    resident_base_model: str = ""


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """Record, reachability and last report together; `report` and `capabilities` are None until heard."""

    node: Node
    state: NodeState
    report: NodeReport | None = None
    capabilities: NodeCapabilities | None = None
    last_heard_time: datetime | None = None
    # Why the node cannot be used though it answers (another installation's, a known-bad library); empty if nothing.
    problem: str = ""
    # Jobs that the node refused because none of its devices has the memory.
    unfit_jobs: frozenset[str] = frozenset()

    @property
    def is_reachable(self) -> bool:
        """Heard from within the lease."""
        return self.state is NodeState.REACHABLE

    @property
    def is_lost(self) -> bool:
        """Nothing was heard from it within the lease. One that speaks again and is not known again yet is not lost."""
        if self.state is NodeState.CONNECTING:
            return self.last_heard_time is None
        return self.state is NodeState.UNREACHABLE

    @property
    def is_draining(self) -> bool:
        """By the operator's wish or its own."""
        return self.node.draining or (self.report is not None and self.report.draining)

    @property
    def resident_base_model(self) -> str:
        """Base model that its engine holds; empty if none."""
        return self.report.resident_base_model if self.report else ""

    def model(self, name: str) -> NodeModel | None:
        """The base model of this name on the node, if it is there."""
        if self.capabilities is None:
            return None
        return next((model for model in self.capabilities.models if model.name == name), None)
