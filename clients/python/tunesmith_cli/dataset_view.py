"""Datasets as people see them: what came in, what was counted, rows with what is learned marked. Asks nothing."""

from collections.abc import Iterable, Sequence

from rich.text import Text

from tunesmith.common.v1 import dataset_pb2
from tunesmith.control.v1 import dataset_service_pb2
from tunesmith_cli.output import Output
from tunesmith_cli.text import byte_count, moment, printable

COLUMNS = ("ID", "NAME", "FORMAT", "FILE", "EXAMPLES", "DUPLICATES", "CHARACTERS", "SIZE", "CREATED")
# How tokens that carry loss are marked: on a terminal, and where there is none.
TARGET_STYLE = "bold green"
TARGET_OPEN, TARGET_CLOSE = "[[", "]]"
_BAR_WIDTH = 40


def row(dataset: dataset_service_pb2.Dataset) -> tuple[object, ...]:
    """A dataset as a row of COLUMNS; a dash where nothing was counted."""
    counted = dataset.HasField("statistics")
    return (
        dataset.dataset_id,
        dataset.name,
        dataset.format,
        file_kind(dataset),
        dataset.num_examples,
        dataset.statistics.num_duplicates if counted else "-",
        f"{dataset.statistics.total_characters:,}" if counted else "-",
        byte_count(dataset.size_bytes),
        moment(dataset.create_time),
    )


def file_kind(dataset: dataset_service_pb2.Dataset) -> str:
    """`csv`, or `csv, gzip`."""
    return ", ".join(filter(None, (dataset.file_format, dataset.compression)))


def show_dataset(out: Output, dataset: dataset_service_pb2.Dataset) -> None:
    """Everything about one dataset."""
    out.message(dataset, _lines(dataset))
    if out.is_json:
        return
    if dataset.statistics.characters:
        show_histogram(out, "characters in an example", dataset.statistics.characters)
    if dataset.statistics.tokens.lengths:
        show_histogram(out, "tokens in an example", dataset.statistics.tokens.lengths)


def _lines(dataset: dataset_service_pb2.Dataset) -> Iterable[tuple[str, object]]:
    yield "id", dataset.dataset_id
    yield "name", dataset.name
    yield "format", dataset.format
    yield "file", f"{file_kind(dataset)} of {byte_count(dataset.file_size_bytes)}" if dataset.file_format else ""
    yield "file sha256", dataset.file_sha256
    yield "rows", f"{byte_count(dataset.size_bytes)} as JSON lines"
    yield "rows sha256", dataset.sha256
    yield "examples", f"{dataset.num_examples:,}"
    if dataset.HasField("statistics"):
        statistics = dataset.statistics
        yield "duplicates", f"{statistics.num_duplicates:,}"
        mean = statistics.total_characters / max(1, dataset.num_examples)
        yield "characters", f"{statistics.total_characters:,} ({mean:,.1f} an example)"
    if dataset.statistics.HasField("tokens"):
        yield from _token_lines(dataset.statistics.tokens)
    yield "created", moment(dataset.create_time)


def _token_lines(tokens: dataset_pb2.TokenStatistics) -> Iterable[tuple[str, object]]:
    yield "base model", tokens.base_model
    yield "tokens", f"{tokens.num_tokens:,}, of which {tokens.num_target_tokens:,} carry loss"
    yield "longest", f"{tokens.longest_tokens:,} tokens"
    yield "cut", f"{tokens.num_truncated:,}" if tokens.num_truncated else ""
    yield "dropped", ", ".join(f"{count:,} {reason}" for reason, count in sorted(tokens.dropped.items()))


def show_histogram(out: Output, what: str, buckets: Sequence[dataset_pb2.HistogramBucket]) -> None:
    """Bars; a bucket reaches up to the next one's minimum, the last has no end."""
    most = max(bucket.count for bucket in buckets)
    ends = [f"{bucket.minimum - 1:,}" for bucket in buckets[1:]] + [""]
    rows = []
    for bucket, end in zip(buckets, ends, strict=True):
        name = f"{bucket.minimum:,}" if end == f"{bucket.minimum:,}" else f"{bucket.minimum:,} - {end}".rstrip()
        # A bucket that has anything at all is seen to have it.
        bar = "#" * max(round(_BAR_WIDTH * bucket.count / max(1, most)), 1 if bucket.count else 0)
        rows.append((name, f"{bucket.count:,}", bar))
    out.rows((what.upper(), "EXAMPLES", ""), rows)


def show_rows(out: Output, rows: Sequence[dataset_service_pb2.DatasetRow]) -> None:
    """Rows rendered for a base model, one under the other, with what carries loss marked; or as they are."""
    if out.is_json or not any(item.HasField("rendered") for item in rows):
        out.table(("LINE", "JSON"), ((item.line, item.json) for item in rows), rows)
        return
    for item in rows:
        example = item.rendered
        out.line(f"line {item.line}: {_counts(example)}")
        if example.rejected_segments:
            out.line("  chosen:")
        out.styled(marked(example.segments, on_terminal=out.console.is_terminal))
        if example.rejected_segments:
            out.line("  rejected:")
            out.styled(marked(example.rejected_segments, on_terminal=out.console.is_terminal))
    how = f"in {TARGET_STYLE}" if out.console.is_terminal else f"between {TARGET_OPEN} and {TARGET_CLOSE}"
    out.remark(f"what carries loss is {how}")


def marked(segments: Iterable[dataset_pb2.Segment], *, on_terminal: bool) -> Text:
    """The segments' text with those that carry loss marked; safe to print."""
    text = Text()
    for segment in segments:
        shown = printable(segment.text, keep_newlines=True)
        if not segment.is_target:
            text.append(shown)
        elif on_terminal:
            text.append(shown, style=TARGET_STYLE)
        else:
            text.append(f"{TARGET_OPEN}{shown}{TARGET_CLOSE}")
    return text


def _counts(example: dataset_pb2.RenderedExample) -> str:
    parts = [f"{example.num_tokens:,} tokens", f"{example.num_target_tokens:,} carry loss"]
    if example.truncated:
        parts.append("cut")
    if example.dropped_reason:
        parts.append(f"not trained on: {example.dropped_reason}")
    return ", ".join(parts)
