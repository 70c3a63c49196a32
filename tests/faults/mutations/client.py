"""What the client's promises hang on: its cursor, the end of watches, and the id that makes a call safe to repeat."""

from __future__ import annotations

from tests.faults.mutations.mutation import Mutation

_CLIENT = "tests/unit/client/test_retry_and_cursor.py::"

CLIENT = (
    Mutation(
        name="an-event-is-given-twice",
        promise="R9",
        file="clients/python/tunesmith_client/_cursor.py",
        snippet="if event.sequence <= self.position:",
        replacement="if False:",
        tests=(f"{_CLIENT}test_events_are_given_once_and_in_order",),
    ),
    Mutation(
        name="a-client-passes-over-a-gap",
        promise="R9",
        file="clients/python/tunesmith_client/_cursor.py",
        snippet="if event.sequence != self.position + 1:",
        replacement="if False:",
        tests=(f"{_CLIENT}test_a_gap_is_an_error_not_a_skip",),
    ),
    Mutation(
        name="a-repeated-call-has-a-new-id",
        promise="R2",
        file="clients/python/tunesmith_client/_retry.py",
        snippet=".fields_by_name and not request.request_id:",
        replacement=".fields_by_name:",
        tests=(f"{_CLIENT}test_mutating_requests_get_an_id_once_and_keep_the_callers",),
    ),
    Mutation(
        name="a-stream-outlives-its-watch",
        promise="R28",
        file="clients/python/tunesmith_client/_watch.py",
        snippet="                self._stream.cancel()\n                return None\n",
        replacement="                pass\n",
        tests=("tests/unit/client/test_watch_closing.py::test_a_stream_that_is_just_being_opened_is_ended_too",),
    ),
    Mutation(
        name="a-closed-client-takes-another-watch",
        promise="R28",
        file="clients/python/tunesmith_client/_caller.py",
        snippet="                raise client_closed()\n            self._open.add(opened)",
        replacement="                pass\n            self._open.add(opened)",
        tests=("tests/unit/client/test_watch_closing.py::test_a_watch_is_either_ended_with_its_client_or_refused",),
    ),
)
