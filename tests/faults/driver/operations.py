"""A client that writes down every call it makes: what it asked, what it was told, or that it was told nothing.

A call whose answer did not come is made again with the same request id until there is one. Knows no promise.
"""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tests.faults.driver.evidence import Evidence
from tunesmith.control.v1 import dataset_service_pb2, job_service_pb2, node_service_pb2, project_service_pb2
from tunesmith_client._errors import error_from_sync

UNKNOWN = "UNKNOWN"
_FILES = (dataset_service_pb2, job_service_pb2, node_service_pb2, project_service_pb2)
_METHODS: Mapping[str, MethodDescriptor] = {
    method.name: method
    for file in _FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# Without a reason of the service's own: the call may or may not have been carried out, and nobody said which.
_NO_ANSWER = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL", "UNKNOWN"})
# With a reason: the service asks to be asked again.
_LATER = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED"})
_CALL_SECONDS = 20.0
_GIVE_UP_SECONDS = 150.0
_PAUSE_SECONDS = 0.1
_CHANNEL = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 300),
]


class Refused(Exception):
    """The service said no, with a code and a reason."""

    def __init__(self, method: str, code: str, reason: str, message: str) -> None:
        super().__init__(f"{method}: {code} {reason}: {message}")
        self.code = code
        self.reason = reason


class LoggedClient:
    """One client process, as far as a service can tell. Safe to use from several threads."""

    def __init__(self, name: str, address: str, evidence: Evidence) -> None:
        self.name = name
        self._evidence = evidence
        self._channel = grpc.insecure_channel(address, options=_CHANNEL)
        self._number = 0
        self._numbering = threading.Lock()

    def close(self) -> None:
        """Ends open calls."""
        self._channel.close()

    def call(self, method: str, request: Message, *, seconds: float = _CALL_SECONDS) -> Any:
        """The answer, however often it has to be asked for. Refused when the answer is a refusal."""
        if "request_id" in request.DESCRIPTOR.fields_by_name and not request.request_id:  # type: ignore[attr-defined]
            request.request_id = uuid.uuid4().hex  # type: ignore[attr-defined]
        gives_up_at = time.monotonic() + _GIVE_UP_SECONDS
        while True:
            answer = self.call_once(method, [request], seconds=seconds)
            if answer is not None:
                return answer
            assert time.monotonic() < gives_up_at, f"{method} had no answer for {_GIVE_UP_SECONDS:.0f} s"
            time.sleep(_PAUSE_SECONDS)

    def upload(self, name: str, content: bytes) -> Any:
        """The dataset, however often its bytes have to be sent."""
        header = dataset_service_pb2.UploadDatasetHeader(
            name=name, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
        )
        requests = [
            dataset_service_pb2.UploadDatasetRequest(header=header),
            dataset_service_pb2.UploadDatasetRequest(chunk=content),
        ]
        gives_up_at = time.monotonic() + _GIVE_UP_SECONDS
        while (answer := self.call_once("UploadDataset", requests, seconds=_CALL_SECONDS)) is None:
            assert time.monotonic() < gives_up_at, "an upload had no answer"
            time.sleep(_PAUSE_SECONDS)
        return answer.dataset

    def call_once(self, method: str, requests: Iterable[Message], *, seconds: float) -> Any:
        """The answer to one try, or None when there is none. Raises Refused."""
        requests = list(requests)
        started = time.monotonic()
        try:
            response = self._send(method, requests, seconds)
        except grpc.RpcError as error:
            typed = error_from_sync(error)
            code = typed.code.name if typed.code is not None else UNKNOWN
            open_ended = code in _NO_ANSWER and not typed.reason
            self._log(method, requests[0], started, UNKNOWN if open_ended else code, typed.reason, None)
            if open_ended or code in _LATER:
                return None
            raise Refused(method, code, typed.reason, typed.message) from error
        self._log(method, requests[0], started, "OK", "", response)
        return response

    def _send(self, method: str, requests: list[Message], seconds: float) -> Any:
        described = _METHODS[method]
        path = f"/{described.containing_service.full_name}/{method}"
        serializer = GetMessageClass(described.input_type).SerializeToString
        deserializer = GetMessageClass(described.output_type).FromString
        if described.client_streaming:
            upload = self._channel.stream_unary(path, request_serializer=serializer, response_deserializer=deserializer)
            return upload(iter(requests), timeout=seconds)
        (request,) = requests
        call = self._channel.unary_unary(path, request_serializer=serializer, response_deserializer=deserializer)
        return call(request, timeout=seconds)

    def _log(
        self, method: str, request: Message, started: float, outcome: str, reason: str, response: Message | None
    ) -> None:
        with self._numbering:
            self._number += 1
            number = self._number
        line = {
            "client": self.name,
            "number": number,
            "method": method,
            "request_id": getattr(request, "request_id", ""),
            "request": json_format.MessageToDict(request, preserving_proto_field_name=True),
            "started": started,
            "ended": time.monotonic(),
            "outcome": outcome,
            "reason": reason,
            "response": None
            if response is None
            else json_format.MessageToDict(response, preserving_proto_field_name=True),
        }
        self._evidence.append("operations", line)
