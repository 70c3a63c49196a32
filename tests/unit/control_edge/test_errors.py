"""Errors on their way out to clients and in from nodes, and page tokens and request keys."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from control_service.adapters.gpu_client.errors import domain_error
from control_service.api.errors import (
    STATUS_CODES,
    internal_error,
    status_code,
    status_message,
    trailing_metadata,
)
from control_service.api.paging import PageTokens, cut_page, page_limit
from control_service.api.requests import request_key
from control_service.domain.errors import (
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    NotFound,
    StoreFull,
    TunesmithError,
    Unavailable,
)
from tunesmith.control.v1 import job_service_pb2, project_service_pb2


def _status(error: TunesmithError) -> status_pb2.Status:
    metadata = dict(trailing_metadata(error, request_id="id-1"))
    assert metadata["x-request-id"] == "id-1"
    return status_pb2.Status.FromString(metadata["grpc-status-details-bin"])


def _details(status: status_pb2.Status) -> dict[str, Any]:
    found = {}
    for detail in status.details:
        message = getattr(error_details_pb2, detail.TypeName().rsplit(".", 1)[-1])()
        assert detail.Unpack(message)
        found[message.DESCRIPTOR.name] = message
    return found


def test_an_error_carries_reason_fields_delay_and_request_id() -> None:
    error = InvalidArgument(
        "INVALID_FIELD",
        "a: is bad",
        details={"line": "3"},
        violations=(FieldViolation("a", "is bad"),),
        retry_after_seconds=1.5,
    )
    status = _status(error)
    details = _details(status)
    assert (status.code, status.message) == (3, "a: is bad")
    assert details["ErrorInfo"].reason == "INVALID_FIELD"
    assert details["ErrorInfo"].domain == "tunesmith"
    assert dict(details["ErrorInfo"].metadata) == {"line": "3"}
    assert [(v.field, v.description) for v in details["BadRequest"].field_violations] == [("a", "is bad")]
    assert details["RetryInfo"].retry_delay.ToMilliseconds() == 1500
    assert details["RequestInfo"].request_id == "id-1"


def test_what_is_absent_is_not_sent() -> None:
    assert set(_details(_status(NotFound("JOB_NOT_FOUND", "no such job")))) == {"ErrorInfo", "RequestInfo"}


def test_the_largest_error_fits_into_the_trailers() -> None:
    error = InvalidArgument(
        "INVALID_FIELD",
        "ü" * 100_000,
        details={f"key{number}": "世" * 5_000 for number in range(50)},
        violations=tuple(FieldViolation(f"field[{number}]" * 50, "ß" * 4_000) for number in range(1_000)),
    )
    size = sum(len(key) + len(value) for key, value in trailing_metadata(error, request_id="i" * 64))
    # In base 64, with the message once more in its own trailer, percent-encoded.
    assert size * 4 / 3 + 3 * len(status_message(error).encode()) < 8192
    details = _details(_status(error))
    assert details["BadRequest"].field_violations
    assert details["ErrorInfo"].metadata["key0"].endswith("...")


def test_a_defect_says_nothing_but_where_to_look() -> None:
    error = internal_error("id-2")
    assert status_code(error) is grpc.StatusCode.INTERNAL
    assert "id-2" in status_message(error)


# What control says of its own database comes back as what it is to others.
@pytest.mark.parametrize("kind", [kind for kind in STATUS_CODES if kind is not StoreFull])
def test_an_error_goes_out_and_comes_back_as_it_was(kind: type[TunesmithError]) -> None:
    error = kind(
        "NODE_BUSY",
        "not now",
        details={"stage": "CONFIG"},
        violations=(FieldViolation("a", "b"),),
        retry_after_seconds=2.0,
    )
    back = domain_error(_failed_call(status_code(error), error), node="n")
    assert type(back) is kind
    assert (back.reason, back.message, back.violations) == (error.reason, error.message, error.violations)
    assert (back.details, back.retry_after_seconds) == ({"stage": "CONFIG", "node": "n"}, 2.0)


def _failed_call(code: grpc.StatusCode, error: TunesmithError | None) -> grpc.aio.AioRpcError:
    pairs = trailing_metadata(error, request_id="x") if error else ()
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), grpc.aio.Metadata(*pairs), details=error.message if error else "lost"
    )


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable, "NODE_UNREACHABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Unavailable, "NODE_UNREACHABLE"),
        (grpc.StatusCode.CANCELLED, Unavailable, "NODE_UNREACHABLE"),
        (grpc.StatusCode.UNKNOWN, Unavailable, "NODE_UNREACHABLE"),
        (grpc.StatusCode.UNIMPLEMENTED, Internal, "INTERNAL"),
        (grpc.StatusCode.NOT_FOUND, Internal, "INTERNAL"),
    ],
)
def test_a_failure_without_our_details_is_the_connections_or_a_strangers(
    code: grpc.StatusCode, kind: type[TunesmithError], reason: str
) -> None:
    error = domain_error(_failed_call(code, None), node="n")
    assert (type(error), error.reason, error.details["node"]) == (kind, reason, "n")


def test_a_broken_trailer_does_not_hide_the_code() -> None:
    call = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff")),
        details="lost",
    )
    assert domain_error(call, node="n").reason == "NODE_UNREACHABLE"


def test_a_subclass_that_the_table_lacks_is_internal() -> None:
    class Novel(FailedPrecondition):
        pass

    assert status_code(Novel("JOB_STATE", "x")) is grpc.StatusCode.INTERNAL


def test_a_token_is_good_for_its_listing_and_filters_alone() -> None:
    tokens = PageTokens(secret="installation")
    token = tokens.encode("17", listing="jobs", filters={"project_id": 1})
    assert tokens.decode(token, listing="jobs", filters={"project_id": 1}) == "17"
    assert tokens.decode("", listing="jobs", filters={}) == tokens.encode("", listing="jobs", filters={}) == ""
    assert PageTokens(secret="installation").decode(token, listing="jobs", filters={"project_id": 1}) == "17"
    for bad, listing, filters, reader in (
        (token, "projects", {"project_id": 1}, tokens),
        (token, "jobs", {"project_id": 2}, tokens),
        (token, "jobs", {"project_id": 1}, PageTokens(secret="other")),
        (token[:-1], "jobs", {"project_id": 1}, tokens),
        ("AAAA", "jobs", {"project_id": 1}, tokens),
        ("ÿ", "jobs", {"project_id": 1}, tokens),
        ("a", "jobs", {"project_id": 1}, tokens),
    ):
        with pytest.raises(InvalidArgument) as caught:
            reader.decode(bad, listing=listing, filters=filters)
        assert caught.value.reason == "PAGE_TOKEN_INVALID"


def _project(number: int, *, size_bytes: int = 1) -> project_service_pb2.Project:
    return project_service_pb2.Project(project_id=number, name="n" * size_bytes)


@pytest.mark.parametrize(
    ("num_items", "page_size", "expected"), [(0, 2, ("", 0)), (2, 2, ("", 2)), (3, 2, ("1", 2)), (60, 0, ("49", 50))]
)
def test_a_page_is_cut_and_says_where_it_ended(num_items: int, page_size: int, expected: tuple[str, int]) -> None:
    items = list(range(num_items))[: page_limit(page_size)]
    page, position = cut_page(items, page_size=page_size, to_message=_project, position=str)
    assert (position, len(page)) == expected


def test_a_page_of_large_messages_ends_early_but_never_empty() -> None:
    def large(number: int) -> project_service_pb2.Project:
        return _project(number, size_bytes=2 * 1024**2)

    page, position = cut_page([1, 2, 3], page_size=3, to_message=large, position=str)
    assert ([project.project_id for project in page], position) == ([1], "1")
    page, position = cut_page([3], page_size=3, to_message=large, position=str)
    assert ([project.project_id for project in page], position) == ([3], "")


def test_a_request_key_is_of_the_body_and_the_method() -> None:
    def key(**fields: Any) -> Any:
        return request_key(job_service_pb2.StartTrainingRequest(**fields), method="StartTraining")

    assert key(project_id=1) is None
    first = key(project_id=1, request_id="a")
    assert (first.method, first.request_id) == ("StartTraining", "a")
    assert key(project_id=1, request_id="b").body_digest == first.body_digest
    assert key(project_id=1, request_id="a", priority=1).body_digest != first.body_digest
