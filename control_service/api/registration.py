"""Collects the handlers of servicers through the generated functions and gives a server all of them in one table.

They are given as generic handlers only: for every method that is registered by name grpc.aio keeps a call that it waits
for, and goes through all of them for each call that comes. WatchJob's pages are encoded once and shared by all watchers
of a job, so its handler must not serialize.
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


class _Table(grpc.GenericRpcHandler):
    """Handlers by a call's full name."""

    def __init__(self, handlers: Mapping[str, Any]) -> None:
        self.handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """None for a method that is not here."""
        return self.handlers.get(handler_call_details.method)


def register(
    server: Any,
    *additions: tuple[Callable[[Any, Any], None], object],
    wrap: Callable[[str, Any], Any],
) -> Mapping[str, Mapping[str, Any]]:
    """Adds servicers, each as (generated `add_..._to_server`, servicer), every handler as `wrap` gives it for its full
    name; gives the handlers by service and method."""
    collector = HandlerCollector()
    for add, servicer in additions:
        add(servicer, collector)
    table = {
        f"/{service}/{name}": wrap(f"/{service}/{name}", handler)
        for service, handlers in collector.handlers.items()
        for name, handler in handlers.items()
    }
    server.add_generic_rpc_handlers((_Table(table),))
    return collector.handlers


def _without_serializer(handler: Any) -> Any:
    return grpc.unary_stream_rpc_method_handler(
        handler.unary_stream, request_deserializer=handler.request_deserializer, response_serializer=None
    )
