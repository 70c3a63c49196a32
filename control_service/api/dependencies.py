"""What the servicers stand on, given to them by the composition root. Builds nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from control_service.api.paging import PageTokens
from control_service.app.dataset_intake import DatasetLimits, ReadTurns
from control_service.app.event_hub import EventHub
from control_service.app.ports import BlobStore, Clock, DatasetFiles, EventCodec, IdSource, ImportRoot, NodeDirectory
from control_service.app.queue import JobQueue
from control_service.app.store_ports import Store


@dataclass(frozen=True, kw_only=True)
class EdgeConfig:
    """Limits of the edge."""

    # A client that stops sending in the middle of an upload is cut off after this long.
    upload_idle_seconds: float = 60.0
    # Watches beyond these are refused with TOO_MANY_REQUESTS, so that they cannot crowd out other calls.
    max_watches: int = 4096


@dataclass(frozen=True, kw_only=True)
class Dependencies:
    """Ports and parts, one of each."""

    store: Store
    blobs: BlobStore
    imports: ImportRoot
    files: DatasetFiles
    nodes: NodeDirectory
    queue: JobQueue
    hub: EventHub
    codec: EventCodec
    clock: Clock
    ids: IdSource
    pages: PageTokens
    turns: ReadTurns
    dataset_limits: DatasetLimits = field(default_factory=DatasetLimits)
    config: EdgeConfig = field(default_factory=EdgeConfig)
