"""Settings of a client, frozen: where, how long, how often again. Opens no connection.

The keepalive pair agrees with the services' (they allow a ping every 10 s): change one, and the other cuts the
connection with "too many pings".
"""

import os
from dataclasses import dataclass

DEFAULT_ADDRESS = "127.0.0.1:50051"
ADDRESS_VARIABLE = "TUNESMITH_ADDRESS"

# Seconds for a whole call, repeats included. What is not named here takes DEFAULT_DEADLINE_SECONDS: longer than a
# service needs to end in order (10 s of grace) and to be started again on a busy machine.
DEFAULT_DEADLINE_SECONDS = 45.0
# GetDataset and PreviewDataset with a base model: a node counts or renders, and may have to be given the rows first.
INSPECTION_SECONDS = 300.0
# PlanTraining with a memory probe: the base is loaded as well.
MEMORY_PROBE_SECONDS = 1800.0
DEADLINE_SECONDS = {
    # An EXACT plan reads and tokenizes the data.
    "PlanTraining": 300.0,
    # A plan at level CHECK comes first.
    "StartTraining": 60.0,
    # Every row is read before the answer.
    "RegisterDataset": 600.0,
    # Frees disk.
    "DeleteJob": 60.0,
    "DeleteArtifact": 60.0,
    "DeleteDataset": 60.0,
}
# Items that a list fetches at a time.
PAGE_SIZE = 200
# An upload gets this long, and a second more for each mebibyte.
UPLOAD_BASE_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How a call that met UNAVAILABLE is repeated, and how a watch reconnects."""

    # Calls in all, the first one counted; None: as many as the call's deadline has room for.
    max_attempts: int | None = None
    initial_backoff_seconds: float = 0.2
    max_backoff_seconds: float = 2.0
    # Each pause is drawn from [1 - jitter, 1] of the back-off, so that many clients do not return together.
    jitter: float = 0.5


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Everything a client is told. `address` is `host:port` of a control service."""

    address: str = DEFAULT_ADDRESS
    retry: RetryPolicy = RetryPolicy()
    # Overrides every method's own deadline when set.
    deadline_seconds: float | None = None
    # The server's heartbeat on a quiet watch; a stream that is silent for 2.5 of them is dropped and opened again.
    heartbeat_seconds: float = 15.0
    # A watch that has heard nothing at all for this long gives up with Unavailable.
    watch_give_up_seconds: float = 600.0
    keepalive_seconds: float = 30.0
    keepalive_timeout_seconds: float = 10.0

    @property
    def silence_limit_seconds(self) -> float:
        """How long a watch stream may say nothing."""
        return 2.5 * self.heartbeat_seconds

    def deadline_of(self, method: str, *, default_seconds: float = DEFAULT_DEADLINE_SECONDS) -> float:
        """Seconds that `method` (the RPC's bare name) may take, repeats included: the longer of its own and the default
        that its call needs."""
        if self.deadline_seconds is not None:
            return self.deadline_seconds
        return max(DEADLINE_SECONDS.get(method, 0.0), default_seconds)

    def channel_options(self) -> list[tuple[str, int]]:
        """Options of the gRPC channel."""
        return [
            ("grpc.keepalive_time_ms", int(self.keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_seconds * 1000)),
            # A ping of gRPC's own that is on its way stands in for the keepalive's; by itself it would wait 60 s.
            ("grpc.http2.ping_timeout_ms", int(self.keepalive_timeout_seconds * 1000)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
            # gRPC's own waits between connection attempts would reach two minutes; ours decide.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 1000),
            ("grpc.max_reconnect_backoff_ms", 2000),
            # As much as a service sends; a plan or a page of events can be larger than gRPC's own 4 MiB.
            ("grpc.max_receive_message_length", 16 * 1024 * 1024),
            # One connection per client: two clients of a process must not share a broken one.
            ("grpc.use_local_subchannel_pool", 1),
        ]


def address_from_environment() -> str:
    """`TUNESMITH_ADDRESS`, or the default port on this machine."""
    return os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS


def inspection_seconds(base_model: str) -> float:
    """How long reading a dataset may take: longer when it is rendered or counted for a base model."""
    return INSPECTION_SECONDS if base_model else DEFAULT_DEADLINE_SECONDS
