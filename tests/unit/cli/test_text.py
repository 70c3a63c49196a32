"""What came from a server cannot drive a terminal, and numbers read well."""

import pytest

from tunesmith.common.v1 import errors_pb2, event_pb2
from tunesmith_cli.describe import describe, trait_losses
from tunesmith_cli.text import byte_count, duration, indented_lines, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain äöü 漢字", "plain äöü 漢字"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\r\nb", "a\\x0d\\x0ab"),
        ("tab\there", "tab\\x09here"),
        ("\x9b31m", "\\x9b31m"),
        ("exe\u202efdp", "exe\\u202efdp"),
    ],
)
def test_control_characters_are_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_only_newlines_can_be_kept() -> None:
    assert printable("a\nb\x1b", keep_newlines=True) == "a\nb\\x1b"


def test_every_line_of_an_event_is_safe() -> None:
    event = event_pb2.Event(kind=event_pb2.EVENT_KIND_LOG)
    event.payload.log.level, event.payload.log.message = "info", "\x1b]0;owned\x07"
    assert describe(event) == "info: \\x1b]0;owned\\x07"


def test_lines_are_indented_and_each_is_safe() -> None:
    assert indented_lines("a\nb\x1b[2J\r\n", 2) == ["  a", "  b\\x1b[2J\\x0d", "  "]


def test_traits_keep_their_place_from_step_to_step() -> None:
    values = [event_pb2.LossValue(trait_type="units", loss=1.0), event_pb2.LossValue(trait_type="coding", loss=2.0)]
    assert trait_losses(values) == trait_losses(reversed(values)) == "coding 2.0000, units 1.0000"


def test_sizes_and_durations() -> None:
    assert [byte_count(size) for size in (0, 1023, 1024, 3 << 30, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 GiB",
        "5.0 TiB",
    ]
    assert [duration(seconds) for seconds in (0, 59.6, 3600, 3723)] == ["0:00", "1:00", "1:00:00", "1:02:03"]


def test_every_kind_of_event_has_a_line_or_a_reason_for_none() -> None:
    for kind in event_pb2.EventKind.DESCRIPTOR.values:
        if not kind.number:
            continue
        event = event_pb2.Event(kind=kind.number)  # type: ignore[arg-type]
        assert describe(event) or kind.name == "EVENT_KIND_RUN_STATE", kind.name


def test_a_kind_of_tomorrow_is_skipped() -> None:
    assert describe(event_pb2.Event(kind=999)) == ""  # type: ignore[arg-type]


def test_a_failure_names_reason_stage_exception_and_file() -> None:
    event = event_pb2.Event(kind=event_pb2.EVENT_KIND_LOADING)
    loading = event.payload.loading
    loading.stage, loading.status = event_pb2.LOADING_STAGE_WEIGHTS, event_pb2.STAGE_STATUS_FAILED
    loading.failure.CopyFrom(
        errors_pb2.Failure(
            reason=errors_pb2.ERROR_REASON_LOAD_WEIGHTS,
            stage="WEIGHTS",
            exception_type="safetensors.SafetensorError",
            message="incomplete metadata",
            file="model.safetensors",
        )
    )
    line = describe(event)
    for part in ("weights", "LOAD_WEIGHTS", "safetensors.SafetensorError", "incomplete metadata", "model.safetensors"):
        assert part in line


def test_checkpoints_say_what_they_are_worth() -> None:
    saved = event_pb2.CheckpointEvent(
        name="step-00000020", status=event_pb2.CHECKPOINT_STATUS_COMMITTED, held_out_loss=1.75, best=True
    )
    resumed = event_pb2.ResumedEvent(
        from_step=20, checkpoint="step-00000020", saved_probe_loss=2.5, measured_probe_loss=2.25
    )
    lines = [
        describe(event_pb2.Event(kind=kind, payload=payload))
        for kind, payload in (
            (event_pb2.EVENT_KIND_CHECKPOINT, event_pb2.EventPayload(checkpoint=saved)),
            (event_pb2.EVENT_KIND_RESUMED, event_pb2.EventPayload(resumed=resumed)),
        )
    ]
    assert lines[0].endswith("held-out loss 1.7500, the best so far")
    assert lines[1].endswith("probe loss 2.500000 when saved, 2.250000 now")
