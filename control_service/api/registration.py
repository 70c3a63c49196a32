"""Registers servicers with a server through the generated functions, with one method's answers sent as they are.

WatchJob's pages are encoded once and shared by all watchers of a job, so its handler must not serialize. grpc differs
between versions in which of two registered handlers wins; here the generated one is replaced before a server sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import grpc

# Methods whose servicers give bytes: (service, method).
ENCODED_METHODS: Final = frozenset({("tunesmith.control.v1.JobService", "WatchJob")})


class HandlerCollector:
    """Stands in for a server while generated code adds a service to it."""

    def __init__(self) -> None:
        self.handlers: dict[str, dict[str, Any]] = {}

    def add_generic_rpc_handlers(self, generic_rpc_handlers: object) -> None:
        """Takes nothing: the same handlers come by name, below."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Keeps a service's handlers, those of encoded methods without their serializer."""
        self.handlers[service] = {
            name: _without_serializer(handler) if (service, name) in ENCODED_METHODS else handler
            for name, handler in handlers.items()
        }


def register(server: Any, *additions: tuple[Callable[[Any, Any], None], object]) -> Mapping[str, Mapping[str, Any]]:
    """Adds servicers, each as (generated `add_..._to_server`, servicer); gives the handlers by service and method."""
    collector = HandlerCollector()
    for add, servicer in additions:
        add(servicer, collector)
    for service, handlers in collector.handlers.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        server.add_registered_method_handlers(service, handlers)
    return collector.handlers


def _without_serializer(handler: Any) -> Any:
    return grpc.unary_stream_rpc_method_handler(
        handler.unary_stream, request_deserializer=handler.request_deserializer, response_serializer=None
    )
