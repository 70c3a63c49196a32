"""How the GPU server keeps its connections; a control service's channel options must agree with these."""

from __future__ import annotations

from typing import Final

MIN_CLIENT_PING_SECONDS: Final = 10
KEEPALIVE_SECONDS: Final = 30
KEEPALIVE_TIMEOUT_SECONDS: Final = 10
MAX_MESSAGE_BYTES: Final = 4 * 1024**2

SERVER_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    # Without this a second server binds the same port silently, and calls go to either.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    # A ping of gRPC's own that is on its way stands in for the keepalive's; by itself it would wait 60 s.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A quiet WatchRun is pinged by control; a client that pings more often than this is cut off.
    ("grpc.http2.min_ping_interval_without_data_ms", MIN_CLIENT_PING_SECONDS * 1000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_CLIENT_PING_SECONDS * 1000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 16 * 1024),
)
