"""Datasets as people see them: histograms, and what carries loss marked on a terminal and off one."""

import io

from rich.console import Console

from tunesmith.common.v1 import dataset_pb2
from tunesmith.control.v1 import dataset_service_pb2
from tunesmith_cli.dataset_view import marked, row, show_dataset, show_rows
from tunesmith_cli.output import Format, Output

SEGMENTS = [
    dataset_pb2.Segment(text="ask\x1b[2J ", is_target=False, num_tokens=1),
    dataset_pb2.Segment(text="answer\n", is_target=True, num_tokens=2),
]


def _output(*, is_terminal: bool) -> tuple[Output, io.StringIO]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=is_terminal, width=200, color_system="standard", highlight=False)
    return Output(Format.TABLE, console=console, remarks=Console(file=io.StringIO())), written


def test_targets_are_marked_by_style_on_a_terminal_and_by_brackets_off_one() -> None:
    plain = marked(SEGMENTS, on_terminal=False)
    assert plain.plain == "ask\\x1b[2J [[answer\n]]"
    styled = marked(SEGMENTS, on_terminal=True)
    assert styled.plain == "ask\\x1b[2J answer\n"
    assert [(span.start, span.end) for span in styled.spans] == [(11, 18)]


def test_rows_are_shown_with_their_counts_and_both_answers_of_a_pair() -> None:
    rendered = dataset_pb2.RenderedExample(
        segments=SEGMENTS,
        rejected_segments=SEGMENTS[1:],
        num_tokens=1234,
        num_target_tokens=2,
        truncated=True,
        dropped_reason="no_target_tokens",
    )
    rows = [dataset_service_pb2.DatasetRow(line=3, json="{}", rendered=rendered)]
    out, written = _output(is_terminal=False)
    show_rows(out, rows)
    assert written.getvalue().splitlines() == [
        "line 3: 1,234 tokens, 2 carry loss, cut, not trained on: no_target_tokens",
        "  chosen:",
        "ask\\x1b[2J [[answer",
        "]]",
        "  rejected:",
        "[[answer",
        "]]",
    ]
    out, written = _output(is_terminal=True)
    show_rows(out, rows)
    assert "\x1b[1;32manswer" in written.getvalue()


def test_a_dataset_is_shown_with_what_came_in_and_what_was_counted() -> None:
    buckets = [dataset_pb2.HistogramBucket(minimum=minimum, count=count) for minimum, count in ((1, 3), (2, 0), (4, 1))]
    dataset = dataset_service_pb2.Dataset(
        dataset_id=7,
        name="rows",
        format="text",
        num_examples=4,
        file_format="csv",
        compression="gzip",
        file_size_bytes=2048,
        statistics=dataset_service_pb2.DatasetStatistics(
            num_duplicates=1,
            total_characters=8,
            characters=buckets,
            tokens=dataset_pb2.TokenStatistics(
                base_model="org/tiny",
                num_tokens=9,
                num_target_tokens=5,
                longest_tokens=4,
                dropped={"no_target_tokens": 1},
            ),
        ),
    )
    assert row(dataset)[2:7] == ("text", "csv, gzip", 4, 1, "8")
    out, written = _output(is_terminal=False)
    show_dataset(out, dataset)
    text = written.getvalue()
    for part in ("csv, gzip of 2.0 KiB", "8 (2.0 an example)", "9, of which 5 carry loss", "1 no_target_tokens"):
        assert part in text
    bars = [line.split() for line in text.splitlines() if line.rstrip().endswith("#") or line.startswith("2 - 3")]
    assert bars == [["1", "3", "#" * 40], ["2", "-", "3", "0"], ["4", "-", "1", "#" * 13]]


def test_a_dataset_of_before_has_dashes_where_nothing_was_counted() -> None:
    assert row(dataset_service_pb2.Dataset(dataset_id=1, name="old", file_format="jsonl"))[5:7] == ("-", "-")
