"""Every RPC of the contract has a handler of the right shape, and every handler is of the contract."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest

from control_service.adapters.gpu_client import channel_options
from control_service.api.errors import STATUS_CODES
from control_service.api.health import HealthReporter
from control_service.api.interceptors import CallConfig
from control_service.bootstrap import register_services
from control_service.domain import errors
from tunesmith.control.v1 import (
    artifact_service_pb2,
    dataset_service_pb2,
    inference_service_pb2,
    job_service_pb2,
    model_service_pb2,
    node_service_pb2,
    project_service_pb2,
)

MODULES: Mapping[str, ModuleType] = {
    "ArtifactService": artifact_service_pb2,
    "DatasetService": dataset_service_pb2,
    "InferenceService": inference_service_pb2,
    "JobService": job_service_pb2,
    "ModelService": model_service_pb2,
    "NodeService": node_service_pb2,
    "ProjectService": project_service_pb2,
}


class _Server:
    """Takes handlers as a server does."""

    def __init__(self) -> None:
        self.handlers: dict[str, dict[str, Any]] = {}
        self.generic: list[Any] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self.generic.extend(handlers)
        for table in handlers:
            for method, handler in table.handlers.items():
                _, service, name = method.split("/")
                self.handlers.setdefault(service, {})[name] = handler


class _Unwrapped:
    """Leaves handlers as they are."""

    def wrap(self, method: str, handler: Any) -> Any:
        return handler


@pytest.fixture
def server() -> _Server:
    server = _Server()
    parts: dict[str, Any] = {"store": None, "clock": None}
    calls: Any = _Unwrapped()
    register_services(server, None, calls=calls, health=HealthReporter(**parts))  # type: ignore[arg-type]
    return server


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_method_is_served_by_code_of_ours(server: _Server, name: str) -> None:
    service = MODULES[name].DESCRIPTOR.services_by_name[name]
    handlers = server.handlers[service.full_name]
    assert set(handlers) == {method.name for method in service.methods}
    for method in service.methods:
        handler = handlers[method.name]
        assert (handler.request_streaming, handler.response_streaming) == (
            method.client_streaming,
            method.server_streaming,
        )
        behavior = next(
            behavior for behavior in (handler.unary_unary, handler.unary_stream, handler.stream_unary) if behavior
        )
        assert inspect.getmodule(behavior).__name__.startswith("control_service.api.")  # type: ignore[union-attr]
        assert inspect.isasyncgenfunction(behavior) == method.server_streaming


def test_only_watch_pages_are_sent_as_they_are(server: _Server) -> None:
    raw = {
        (service, name)
        for service, handlers in server.handlers.items()
        for name, handler in handlers.items()
        if handler.response_serializer is None
    }
    assert raw == {("tunesmith.control.v1.JobService", "WatchJob")}
    # One table, and nothing registered by name, for which a server would wait method by method.
    assert len(server.generic) == 1
    assert len(server.handlers) == len(MODULES) + 1


def test_every_error_class_of_the_domain_has_its_code() -> None:
    classes = {
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.TunesmithError) and value is not errors.TunesmithError
    }
    assert classes <= set(STATUS_CODES)
    # A full database is a full disk to callers, and a pause to what control does by itself.
    codes = [STATUS_CODES[kind] for kind in classes if kind is not errors.StoreFull]
    assert len(set(codes)) == len(codes)


def test_time_limits_name_methods_that_there_are() -> None:
    methods = {
        method.name for name, module in MODULES.items() for method in module.DESCRIPTOR.services_by_name[name].methods
    }
    assert set(CallConfig().max_seconds_by_method) <= methods


@pytest.mark.parametrize("server_module", ["control_service.api.server_options", "gpu_service.api.server_options"])
def test_pings_of_our_channels_are_allowed_by_our_servers(server_module: str) -> None:
    channel: dict[str, Any] = dict(channel_options.CHANNEL_OPTIONS)
    server_side: dict[str, Any] = dict(pytest.importorskip(server_module).SERVER_OPTIONS)
    least = server_side["grpc.http2.min_ping_interval_without_data_ms"]
    assert channel["grpc.keepalive_time_ms"] > least
    assert server_side["grpc.keepalive_permit_without_calls"] == channel["grpc.keepalive_permit_without_calls"] == 1
    assert server_side["grpc.so_reuseport"] == 0
