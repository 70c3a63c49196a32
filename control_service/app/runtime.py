"""The moving parts of control in one object: node monitor, scheduler, supervisor, event hub. Chooses no adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from control_service.app.event_hub import EventHub, EventHubConfig
from control_service.app.ports import BlobStore, Clock, EventCodec, NodeDialer, NodeDirectory
from control_service.app.store_ports import Store


@dataclass(frozen=True, kw_only=True)
class NodeMonitorConfig:
    """How nodes are listened to."""

    lease_seconds: float = 30.0
    heartbeat_seconds: float = 5.0
    reconnect_initial_seconds: float = 0.2
    reconnect_max_seconds: float = 5.0


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """What is kept where."""

    # Lets nodes delete runs of jobs that are over, with journals, checkpoints and artifacts that control has.
    release_runs: bool = True
    # The newest checkpoint of a job is copied into control's store when its files are not larger; 0: never.
    replicate_checkpoint_max_bytes: int = 512 * 1024**2


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Settings of the moving parts."""

    nodes: NodeMonitorConfig = field(default_factory=NodeMonitorConfig)
    events: EventHubConfig = field(default_factory=EventHubConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)


class Runtime:
    """Started once after the store is open; stopped before it is closed."""

    hub: EventHub
    nodes: NodeDirectory

    def __init__(
        self,
        *,
        store: Store,
        dialer: NodeDialer,
        codec: EventCodec,
        blobs: BlobStore,
        clock: Clock,
        config: RuntimeConfig,
    ) -> None:
        raise NotImplementedError

    async def start(self, *, configured_nodes: Sequence[tuple[str, str]] = ()) -> None:
        """Registers the (name, address) pairs from the settings, dials every node, and takes up every live job."""

    def drain(self) -> None:
        """Ends watches with SHUTTING_DOWN and dispatches nothing more; supervision goes on."""

    async def stop(self) -> None:
        """Ends every task. Runs on nodes go on."""
