"""The moving parts of control in one object: node monitor, scheduler, supervisor, sweeper, event hub. Chooses no
adapter, and holds no rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from control_service.app.attempts import AttemptStarter
from control_service.app.back_off import BackOffConfig
from control_service.app.collector import Collector, CollectorConfig
from control_service.app.compactor import Compactor
from control_service.app.content import free_forgotten
from control_service.app.event_hub import EventHub, EventHubConfig
from control_service.app.keeper import KeeperPorts
from control_service.app.leftovers import LeftoverSweeper
from control_service.app.node_monitor import NodeMonitor, NodeMonitorConfig
from control_service.app.nodes import configure_nodes
from control_service.app.ports import BlobStore, Clock, EventCodec, NodeDialer, NodeDirectory
from control_service.app.queue import JobQueue
from control_service.app.replicator import Replicator
from control_service.app.scheduler import Scheduler
from control_service.app.settle import Settler
from control_service.app.store_ports import Store
from control_service.app.supervisor import Supervisor

__all__ = ["NodeMonitorConfig", "RetentionConfig", "Runtime", "RuntimeConfig"]


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """What is kept where."""

    # Lets nodes delete runs of jobs that are over, with journals, checkpoints and artifacts that control has.
    release_runs: bool = True
    # The newest checkpoint of a job is copied into control's store when its files are not larger; 0: never.
    replicate_checkpoint_max_bytes: int = 512 * 1024**2
    # Events of jobs that were over for longer are compacted to the last one; 0: never.
    events: timedelta = timedelta(0)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Settings of the moving parts."""

    nodes: NodeMonitorConfig = field(default_factory=NodeMonitorConfig)
    events: EventHubConfig = field(default_factory=EventHubConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    collector: CollectorConfig = field(default_factory=CollectorConfig)
    back_off: BackOffConfig = field(default_factory=BackOffConfig)


class Runtime:
    """Built with a running event loop; started once after the store is open, stopped before it is closed."""

    hub: EventHub
    nodes: NodeDirectory
    queue: JobQueue

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
        self._store = store
        self._blobs = blobs
        self._codec = codec
        self._clock = clock
        self._monitor = NodeMonitor(store=store, dialer=dialer, clock=clock, config=config.nodes)
        self.nodes = self._monitor
        self.queue = JobQueue(store=store, nodes=self._monitor, clock=clock)
        self.hub = EventHub(store=store, codec=codec, config=config.events)
        retention = config.retention
        settler = Settler(store=store, blobs=blobs, codec=codec, clock=clock)
        starter = AttemptStarter(
            store=store, nodes=self._monitor, blobs=blobs, codec=codec, clock=clock, settler=settler
        )
        collector = Collector(
            store=store, blobs=blobs, codec=codec, clock=clock, settler=settler, config=config.collector
        )
        replicator = Replicator(
            store=store,
            blobs=blobs,
            codec=codec,
            clock=clock,
            max_checkpoint_bytes=retention.replicate_checkpoint_max_bytes,
        )
        self._supervisor = Supervisor(
            KeeperPorts(
                store=store,
                nodes=self._monitor,
                codec=codec,
                clock=clock,
                starter=starter,
                collector=collector,
                settler=settler,
                replicator=replicator,
                back_off=config.back_off,
            )
        )
        self._scheduler = Scheduler(
            store=store,
            nodes=self._monitor,
            queue=self.queue,
            codec=codec,
            clock=clock,
            back_off=config.back_off,
        )
        self._sweeper = LeftoverSweeper(
            store=store,
            blobs=blobs,
            nodes=self._monitor,
            clock=clock,
            back_off=config.back_off,
            release_runs=retention.release_runs,
        )

        self._compactor = Compactor(store=store, clock=clock, back_off=config.back_off, retention=retention.events)

    async def start(self, *, configured_nodes: Sequence[tuple[str, str]] = ()) -> None:
        """Takes over the (name, address) pairs from the settings, dials every node, and takes up every live job."""
        now = self._clock.utc_now()
        await self._store.transact(lambda tx: configure_nodes(tx, configured_nodes, now))
        await free_forgotten(store=self._store, blobs=self._blobs, codec=self._codec)
        await self._monitor.start()
        self._supervisor.start()
        self._sweeper.start()
        self._scheduler.start()
        self._compactor.start()

    def drain(self) -> None:
        """Ends watches with SHUTTING_DOWN and dispatches nothing more; supervision goes on."""
        self._scheduler.drain()
        self.hub.drain()

    async def stop(self) -> None:
        """Ends every task. Runs on nodes go on."""
        self.drain()
        await self._compactor.stop()
        await self._scheduler.stop()
        await self._sweeper.stop()
        await self._supervisor.stop()
        await self._monitor.stop()
