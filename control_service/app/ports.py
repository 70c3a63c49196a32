"""What the application needs from outside, as Protocols. Each docstring is the contract its adapter keeps.

The store's own ports are in `store_ports`. Errors that cross a port are `TunesmithError`s; nothing else is expected.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from threading import Event
from typing import Any, BinaryIO, Protocol

from control_service.domain.artifact import FileReference
from control_service.domain.dataset import DatasetInspection
from control_service.domain.dataset_files import OpenedFile
from control_service.domain.event import ControlFact, Fact, StoredEvent
from control_service.domain.generation import GeneratedPart, GenerationRequest
from control_service.domain.node import NodeCapabilities, NodeReport, NodeView
from control_service.domain.run import ObservedRun, ResumeFrom, RunKey, StopMode
from control_service.domain.spec import DatasetReference, TrainingSpec


class PlanLevel(StrEnum):
    """How far planning goes."""

    CHECK = "CHECK"
    EXACT = "EXACT"


class Clock(Protocol):
    """Time. UTC is for display and for what is stored; every duration and timeout is monotonic."""

    def utc_now(self) -> datetime:
        """The time of day, aware, in UTC."""

    def steady_utc_now(self) -> datetime:
        """UTC as it was when the process began, plus the monotonic seconds since: what stored waits are measured by.
        Setting the machine's clock moves it only at the next start."""

    def monotonic_seconds(self) -> float:
        """Seconds that never go back."""

    async def sleep(self, seconds: float) -> None:
        """Waits; wakes with CancelledError when the task is cancelled."""


class IdSource(Protocol):
    """Ids of jobs."""

    def new_id(self) -> str:
        """A ULID, larger than every earlier one of this process."""


@dataclass(frozen=True, kw_only=True)
class StartRun:
    """What `NodeClient.start_run` sends. `weights_digest` empty: none is pinned yet."""

    key: RunKey
    spec: TrainingSpec
    spec_digest: str
    weights_digest: str = ""
    resume_from: ResumeFrom | None = None


@dataclass(frozen=True, kw_only=True)
class InspectDataset:
    """What `NodeClient.inspect_dataset` sends. Empty and 0 mean the node's defaults; `num_rows` from the first."""

    dataset: DatasetReference
    base_model: str
    chat_template: str = ""
    loss_on: str = ""
    max_length: int = 0
    num_rows: int = 0
    count_tokens: bool = False


class NodeClient(Protocol):
    """One node, dialed. Every method raises Unavailable NODE_UNREACHABLE when the node cannot be reached or the
    connection is lost; a refusal of the node is raised as the TunesmithError of its kind with the node's own reason,
    message, details and violations (details `stage` and `fault` when the node gave them)."""

    async def capabilities(self) -> NodeCapabilities:
        """What the node is and can do."""

    async def plan_run(
        self,
        *,
        spec: TrainingSpec,
        level: PlanLevel,
        probe_memory: bool = False,
        timeout_seconds: float | None = None,
    ) -> Mapping[str, Any]:
        """`Plan` as proto JSON with proto field names. None: the adapter's own limit for the level. A memory probe goes
        with EXACT only; ResourceExhausted NODE_BUSY when its device is taken, MEMORY_PROBE when it fails.
        DeadlineTooShort DEADLINE_TOO_SHORT when it takes longer."""

    async def inspect_dataset(
        self, request: InspectDataset, *, timeout_seconds: float | None = None
    ) -> DatasetInspection:
        """Rows of a dataset that the node has, as a base will see them, and their tokens. None: the adapter's own
        limit. DeadlineTooShort DEADLINE_TOO_SHORT when it takes longer."""

    async def start_run(self, request: StartRun) -> ObservedRun:
        """Starts an attempt; the same request again is the same run. ResourceExhausted NODE_BUSY: not now."""

    async def get_run(self, key: RunKey) -> ObservedRun | None:
        """The run as it stands; None when the node has no such run."""

    async def stop_run(self, key: RunKey, *, mode: StopMode, grace_seconds: float = 0.0) -> ObservedRun | None:
        """Asks a run to end; answers at once. 0: the node's own grace. None: the node has no such run."""

    async def release_run(self, key: RunKey) -> int:
        """Lets the node delete a run that is over; bytes freed. A run that is not there frees 0."""

    def watch_run(self, key: RunKey, *, after_run_sequence: int) -> AsyncIterator[Sequence[StoredEvent]]:
        """Batches in run sequence without a gap, history then tail; `sequence` is 0. Ends after the last event of a
        run that is over. NotFound RUN_NOT_FOUND."""

    def watch_node(self, *, heartbeat_seconds: float) -> AsyncIterator[NodeReport]:
        """The node's report at once, on every change, and every heartbeat. Never ends but by an error."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedPart, None]:
        """An answer in parts, the last with a finish reason; closing it ends the generation. ResourceExhausted
        NODE_BUSY, also in the middle: a run needs the device."""

    async def find_missing_blobs(self, sha256s: Sequence[str]) -> Mapping[str, int]:
        """Blobs that the node lacks -> bytes of an unfinished write that can be continued."""

    async def write_blob(self, *, sha256: str, size_bytes: int, offset: int, chunks: AsyncIterable[bytes]) -> None:
        """Sends a blob from `offset` on; visible on the node only when size and SHA-256 are right."""

    def read_blob(self, sha256: str, *, offset: int = 0) -> AsyncIterator[bytes]:
        """A blob, or a file of a run's artifact or checkpoint, by content. NotFound BLOB_NOT_FOUND."""

    async def close(self) -> None:
        """Gives the connection back."""


class NodeDialer(Protocol):
    """Makes clients of nodes. Dialing does not wait for the node."""

    def dial(self, *, name: str, address: str, installation_id: str) -> NodeClient:
        """A client for `host:port`, speaking for this installation."""


class NodeDirectory(Protocol):
    """The nodes as control sees them now. Kept by `node_monitor`; read without waiting."""

    def views(self) -> Sequence[NodeView]:
        """Every registered node, by name."""

    def view(self, name: str) -> NodeView | None:
        """One node."""

    def client(self, name: str) -> NodeClient | None:
        """The client of a registered node, reachable or not."""

    async def refresh(self) -> None:
        """Asks every reachable node for its capabilities again; one that does not answer keeps what it said last."""


class EventCodec(Protocol):
    """Turns control's facts into payload bytes and payloads into the facts control reads. Payloads are opaque else."""

    def encode(self, fact: ControlFact) -> tuple[int, bytes]:
        """(event kind number, serialized EventPayload)."""

    def decode(self, kind: int, payload: bytes) -> Fact | None:
        """The fact of a payload; None for a kind that control does not read or know. Internal: it cannot be read."""

    def is_payload(self, payload: bytes) -> bool:
        """False for bytes that are no payload of any kind: they would break every page that has them."""

    def encode_page(self, events: Sequence[StoredEvent]) -> bytes:
        """A serialized WatchJobResponse with these events."""

    def encode_heartbeat(self, position: int) -> bytes:
        """A serialized WatchJobResponse with a heartbeat."""


@dataclass(frozen=True, kw_only=True)
class StagedBlob:
    """Bytes that arrived but are not yet in the store. `token` means something to the blob store alone."""

    token: str
    sha256: str
    size_bytes: int


class BlobWriter(Protocol):
    """Bytes that are being staged by a thread. Blocking."""

    def append(self, chunk: bytes) -> None:
        """Adds bytes. ResourceExhausted TOO_LARGE above the limit; DISK_FULL."""

    def finish(self) -> StagedBlob:
        """Makes the bytes durable; from now on they are the caller's to commit or discard."""

    def close(self) -> None:
        """Forgets the bytes unless `finish` gave them away."""


class BlobStore(Protocol):
    """Control's content-addressed bytes, and the output tree that people read. Never blocks the event loop."""

    async def stage(self, chunks: AsyncIterable[bytes], *, max_bytes: int) -> StagedBlob:
        """Takes bytes in and hashes them. ResourceExhausted TOO_LARGE above max_bytes; DISK_FULL."""

    def open_writer(self, *, max_bytes: int) -> BlobWriter:
        """Starts staging bytes that a thread makes; the caller closes it."""

    def open_staged(self, staged: StagedBlob) -> BinaryIO:
        """A blocking reader of staged bytes, for use in a thread; the caller closes it."""

    async def commit(self, staged: StagedBlob) -> None:
        """Makes staged bytes durable and visible under their SHA-256. A blob that is there already is kept."""

    async def discard(self, staged: StagedBlob) -> None:
        """Forgets staged bytes. Nothing happens when they were committed or discarded."""

    async def has(self, sha256: str) -> bool:
        """True when the blob is there, whole."""

    def open_blob(self, sha256: str) -> BinaryIO:
        """A blocking reader of a blob, for use in a thread. NotFound BLOB_NOT_FOUND."""

    def read(self, sha256: str, *, offset: int = 0) -> AsyncIterator[bytes]:
        """A blob from an offset in chunks of at most 1 MiB. NotFound BLOB_NOT_FOUND."""

    async def delete(self, sha256: str) -> int:
        """Deletes a blob; bytes freed, 0 when it was not there."""

    async def list_all(self) -> Sequence[str]:
        """SHA-256 of every blob that is there."""

    async def materialize(self, *, path: str, files: Sequence[FileReference]) -> None:
        """Makes `<output root>/<path>/` hold exactly these files (staged, verified, fsynced, renamed). Done again, it
        replaces. `path` is relative and was checked. NotFound BLOB_NOT_FOUND; ResourceExhausted DISK_FULL."""

    async def remove_output(self, *, path: str) -> None:
        """Deletes `<output root>/<path>/` if it is there, and directories left empty above it below the root."""


class DatasetFiles(Protocol):
    """Readers of datasets' files."""

    def open(self, stream: BinaryIO, *, size_bytes: int, unwanted: Event) -> AbstractContextManager[OpenedFile]:
        """Finds out by its bytes what a seekable stream of `size_bytes` is. Blocking, for use in a thread; rows are
        read as they are asked for and only inside the context. Once `unwanted` is set, what waits for another process
        ends soon, whatever it ends with. Reading rows raises Trouble where the file can be read
        no further, ResourceExhausted TOO_LARGE where it becomes too large."""


class ImportRoot(Protocol):
    """Files that an operator lets people register by name."""

    def read(self, path: str) -> AsyncIterator[bytes]:
        """A file below the import root. InvalidArgument PATH_NOT_ALLOWED; NotFound BLOB_NOT_FOUND; FailedPrecondition
        PATH_NOT_ALLOWED when no import root is set."""
