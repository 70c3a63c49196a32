"""Errors are typed by status, named by reason, and never read from text."""

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

import tunesmith_client
from tunesmith_client._errors import FieldViolation, error_from_parts


def status_bytes(*details: object) -> bytes:
    status = status_pb2.Status()
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)  # type: ignore[arg-type]
        status.details.append(packed)
    return bytes(status.SerializeToString())


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, tunesmith_client.InvalidArgument),
        (grpc.StatusCode.OUT_OF_RANGE, tunesmith_client.OutOfRange),
        (grpc.StatusCode.NOT_FOUND, tunesmith_client.NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, tunesmith_client.AlreadyExists),
        (grpc.StatusCode.FAILED_PRECONDITION, tunesmith_client.FailedPrecondition),
        (grpc.StatusCode.ABORTED, tunesmith_client.Aborted),
        (grpc.StatusCode.PERMISSION_DENIED, tunesmith_client.AccessDenied),
        (grpc.StatusCode.UNAUTHENTICATED, tunesmith_client.AccessDenied),
        (grpc.StatusCode.UNAVAILABLE, tunesmith_client.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, tunesmith_client.DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, tunesmith_client.ResourceExhausted),
        (grpc.StatusCode.CANCELLED, tunesmith_client.CallCancelled),
        (grpc.StatusCode.INTERNAL, tunesmith_client.ServiceDefect),
        (grpc.StatusCode.UNKNOWN, tunesmith_client.ServiceDefect),
        (grpc.StatusCode.UNIMPLEMENTED, tunesmith_client.ServiceDefect),
        (grpc.StatusCode.DATA_LOSS, tunesmith_client.ServiceDefect),
    ],
)
def test_every_status_has_its_class(code: grpc.StatusCode, expected: type[Exception]) -> None:
    error = error_from_parts(code, "text", None)
    assert type(error) is expected
    assert isinstance(error, tunesmith_client.TunesmithError)
    assert (error.code, error.reason, error.message) == (code, "", "text")


def test_all_details_are_read() -> None:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    error = error_from_parts(
        grpc.StatusCode.INVALID_ARGUMENT,
        "percentages sum to 99",
        status_bytes(
            error_details_pb2.ErrorInfo(reason="PERCENTAGES_NOT_100", domain="tunesmith", metadata={"sum": "99"}),
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field="traits[0].datasets", description="sum to 99")
                ]
            ),
            retry,
            error_details_pb2.RequestInfo(request_id="r-1"),
        ),
    )
    assert error.reason == "PERCENTAGES_NOT_100"
    assert error.metadata == {"sum": "99"}
    assert error.field_violations == (FieldViolation(field="traits[0].datasets", description="sum to 99"),)
    assert error.retry_after_seconds == 1.5
    assert error.request_id == "r-1"
    assert str(error) == "PERCENTAGES_NOT_100: percentages sum to 99"


def test_a_reason_of_tomorrow_stays_a_string() -> None:
    info = error_details_pb2.ErrorInfo(reason="MOON_IN_THE_WAY", domain="tunesmith")
    error = error_from_parts(grpc.StatusCode.FAILED_PRECONDITION, "wait", status_bytes(info))
    assert error.reason == "MOON_IN_THE_WAY"
    assert type(error) is tunesmith_client.FailedPrecondition


def test_the_public_surface_is_what_it_is() -> None:
    assert sorted(tunesmith_client.__all__) == [
        "Aborted",
        "AccessDenied",
        "AlreadyExists",
        "Answer",
        "AsyncClient",
        "CallCancelled",
        "Client",
        "ClientConfig",
        "DeadlineExceeded",
        "FailedPrecondition",
        "FieldViolation",
        "InvalidArgument",
        "JobFailed",
        "NotFound",
        "OutOfRange",
        "Refused",
        "ResourceExhausted",
        "RetryPolicy",
        "SamplingOptions",
        "ServiceDefect",
        "TERMINAL_STATES",
        "TransferDamaged",
        "TransferProgress",
        "TunesmithError",
        "Unavailable",
        "Watch",
        "reason_name",
        "state_name",
    ]
    assert all(hasattr(tunesmith_client, name) for name in tunesmith_client.__all__)
