"""How control keeps its channels to nodes. Servers of ours allow these pings; a contract test holds them to it."""

from __future__ import annotations

from typing import Final

KEEPALIVE_SECONDS: Final = 30
KEEPALIVE_TIMEOUT_SECONDS: Final = 10
MAX_MESSAGE_BYTES: Final = 16 * 1024**2

CHANNEL_OPTIONS: Final[tuple[tuple[str, int | str], ...]] = (
    # A half-open link is invisible without pings; watches are quiet for long, and ping with and without calls alike.
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    # A ping of gRPC's own that is on its way stands in for the keepalive's; by itself it would wait 60 s.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # The monitor paces its own attempts; the channel must not hold a node that came back away for minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A node is dialed, never asked for through a proxy of the environment.
    ("grpc.enable_http_proxy", 0),
    # Clients of one process to one node (after a new registration) share nothing.
    ("grpc.use_local_subchannel_pool", 1),
)
