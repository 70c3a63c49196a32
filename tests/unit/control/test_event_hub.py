"""What the hub keeps of a watched job between a commit and its showing: bounded by events and by bytes."""

from __future__ import annotations

from datetime import UTC, datetime

from control_service.app import event_hub
from control_service.domain.event import EventKind, StoredEvent

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def _event(sequence: int, size_bytes: int) -> StoredEvent:
    return StoredEvent(
        sequence=sequence,
        attempt=1,
        run_sequence=sequence,
        kind=EventKind.STEP,
        time=NOW,
        payload=b"x" * size_bytes,
    )


def test_small_events_are_kept_until_they_are_shown() -> None:
    feed = event_hub._Feed(lambda _: None)
    for sequence in range(1, 101):
        feed.take([_event(sequence, 10)], sequence)
    assert [event.sequence for event in feed.newest] == list(range(1, 101))
    feed.show()
    assert (feed.newest, feed.shown_sequence) == ([], 100)


def test_large_events_do_not_pile_up_while_a_crowd_is_being_woken() -> None:
    feed = event_hub._Feed(lambda _: None)
    for sequence in range(1, 201):
        feed.take([_event(sequence, event_hub._MAX_NEWEST_BYTES // 10)], sequence)
        assert sum(len(event.payload) for event in feed.newest) <= event_hub._MAX_NEWEST_BYTES
    assert feed.last_sequence == 200


def test_what_was_shown_does_not_count() -> None:
    feed = event_hub._Feed(lambda _: None)
    for sequence in range(1, 41):
        feed.take([_event(sequence, event_hub._MAX_NEWEST_BYTES // 10)], sequence)
        assert len(feed.newest) == 1
        feed.show()
