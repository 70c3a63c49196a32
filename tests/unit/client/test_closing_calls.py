"""Calls that are made, or made again, while another thread closes their client: a typed error, whatever the moment."""

from __future__ import annotations

import time

import grpc
import pytest

from tunesmith_client import CallCancelled, ClientConfig, RetryPolicy
from tunesmith_client._caller import Caller


class _Lost(grpc.RpcError):
    """As a call ends whose server is not there."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "nobody is there"

    def trailing_metadata(self) -> tuple[()]:
        return ()


def _caller() -> Caller:
    return Caller(ClientConfig(retry=RetryPolicy(initial_backoff_seconds=0.0, max_backoff_seconds=0.0)))


def test_a_client_that_is_closed_between_two_attempts_says_so() -> None:
    caller, num_attempts = _caller(), 0

    def attempt() -> None:
        nonlocal num_attempts
        num_attempts += 1
        if num_attempts == 1:
            raise _Lost
        # It was not closed yet when the pause was over.
        caller.close()
        raise ValueError("Cannot invoke RPC on closed channel!")

    with pytest.raises(CallCancelled, match="the client is closed"):
        caller.repeat(attempt, ends_at=time.monotonic() + 60)
    assert num_attempts == 2


def test_a_client_that_was_closed_before_says_so() -> None:
    caller = _caller()
    caller.close()

    def attempt() -> None:
        raise ValueError("Cannot invoke RPC on closed channel!")

    with pytest.raises(CallCancelled, match="the client is closed"):
        caller.repeat(attempt, ends_at=time.monotonic() + 60)


def test_a_wrong_value_of_an_open_client_is_the_callers_own() -> None:
    def attempt() -> None:
        raise ValueError("a wrong value")

    with pytest.raises(ValueError, match="a wrong value"):
        _caller().repeat(attempt, ends_at=time.monotonic() + 60)
