"""A dataset as a base would see it: its first rows rendered, its tokens counted. Plans nothing and keeps nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from gpu_service.catalog import datasets as dataset_formats
from gpu_service.catalog import templates
from gpu_service.catalog.base_models import BaseModel, read_directory
from gpu_service.domain.defaults import CHOICES, DEFAULT_MAX_LENGTH, RANGES
from gpu_service.domain.errors import refuse_user
from gpu_service.domain.spec import DatasetReference, decode_message
from gpu_service.planner.encoding import EncodedExample, ExampleEncoder, split_batches
from gpu_service.planner.progress import Progress
from gpu_service.planner.row_rendering import RowRenderer
from gpu_service.planner.rows import find_blob, read_rows
from gpu_service.planner.tokenizer import TextTokenizer
from gpu_service.planner.toolchain import load_toolchain

# Of all rendered rows together: an answer must fit a message.
MAXIMUM_TEXT_BYTES = 2 * 1024 * 1024
# What a segment takes beside its text, at most.
_SEGMENT_BYTES = 24


@dataclass(frozen=True, kw_only=True)
class InspectRequest:
    """The request file, decoded. Empty and 0 mean the defaults of a run; `num_rows` counts from the first row."""

    dataset: DatasetReference
    base_model: str
    chat_template: str
    loss_on: str
    max_length: int
    num_rows: int
    count_tokens: bool
    model_directory: Path
    blobs_directory: Path
    cache_directory: Path

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "InspectRequest":
        """Raises `Refusal` for a bad dataset reference, `KeyError`, `TypeError` or `ValueError` for a bad request."""
        wanted = value["inspect"]
        return cls(
            dataset=decode_message(DatasetReference, wanted["dataset"], "dataset"),
            base_model=wanted["base_model"],
            chat_template=wanted.get("chat_template") or "",
            loss_on=wanted.get("loss_on") or "",
            max_length=int(wanted.get("max_length") or 0),
            num_rows=int(wanted.get("num_rows") or 0),
            count_tokens=wanted.get("count_tokens") is True,
            model_directory=Path(value["model_directory"]),
            blobs_directory=Path(value["blobs_directory"]),
            cache_directory=Path(value["cache_directory"]),
        )


def inspect_dataset(request: InspectRequest, *, stream: TextIO) -> dict[str, Any]:
    """`InspectDatasetResponse` as proto JSON. Progress goes to `stream`. Raises `Refusal`, `OSError`.

    Rows end before the one with which their text would be more than `MAXIMUM_TEXT_BYTES`.
    """
    base = read_directory(request.model_directory, request.base_model)
    max_length = _check(request, base)
    tools = load_toolchain(
        base,
        cache_directory=request.cache_directory,
        chat_template=request.chat_template or None,
        max_length=max_length,
        loss_on=request.loss_on or "targets",
    )
    encoder = ExampleEncoder(tools.tokenizer, loss_on_all=request.loss_on == "all", max_length=max_length)
    renderer = RowRenderer(request.dataset, tools.chat)
    blob = find_blob(request.blobs_directory, request.dataset)
    rows = read_rows(blob, request.dataset)
    if not request.count_tokens:
        # No more is read than is shown: then nothing is said of the file's end.
        rows = islice(rows, request.num_rows)
    progress = Progress(stream, total=request.dataset.num_examples)
    statistics = _Statistics(base_model=request.base_model)
    shown: list[EncodedExample] = []
    for batch in split_batches(renderer.render(line, row) for line, row in rows):
        examples = encoder.encode(batch)
        shown += examples[: max(request.num_rows - len(shown), 0)]
        for example in examples:
            statistics.add(example)
        progress.advance(len(examples))
    progress.finish()
    return {
        "rows": list(_fit(describe_example(example, tools.tokenizer) for example in shown)),
        **({"tokens": statistics.to_json()} if request.count_tokens else {}),
    }


def _check(request: InspectRequest, base: BaseModel) -> int:
    """The length at which examples are cut. Raises `Refusal` as a plan with these settings would be refused."""
    entry = dataset_formats.REGISTRY.get(request.dataset.format)
    if entry is None:
        raise refuse_user(
            "DATASET_FORMAT_UNKNOWN",
            f"dataset {request.dataset.dataset_id} has format {request.dataset.format!r}; the catalog has "
            + ", ".join(dataset_formats.REGISTRY),
            field="dataset.format",
        )
    known = ", ".join(templates.REGISTRY)
    if request.chat_template and request.chat_template not in templates.REGISTRY:
        raise refuse_user(
            "INVALID_FIELD",
            f"the catalog has no chat template {request.chat_template!r}; it has {known}",
            field="chat_template",
        )
    if entry.needs_chat_template and not (request.chat_template or base.has_chat_template):
        raise refuse_user(
            "CHAT_TEMPLATE_MISSING",
            f"dataset {request.dataset.dataset_id} is chat, and the base model has no chat template; name one of the "
            f"catalog's: {known}",
            field="chat_template",
            stage="TOKENIZER",
            dataset_id=request.dataset.dataset_id,
            available=",".join(templates.REGISTRY),
        )
    choices = CHOICES["loss_on"]
    if request.loss_on and request.loss_on not in choices:
        raise refuse_user("INVALID_FIELD", f"loss_on must be one of {', '.join(choices)}", field="loss_on")
    smallest, largest = (int(limit) for limit in RANGES["max_length"])
    largest = base.max_position_embeddings or largest
    length = request.max_length or min(DEFAULT_MAX_LENGTH, largest)
    if not smallest <= length <= largest:
        raise refuse_user(
            "INVALID_FIELD", f"max_length must be at least {smallest} and at most {largest}", field="max_length"
        )
    return length


@dataclass(kw_only=True)
class _Statistics:
    """`TokenStatistics`. What is dropped is counted as that alone: lengths and tokens are those that are trained on."""

    base_model: str
    num_tokens: int = 0
    num_target_tokens: int = 0
    longest_tokens: int = 0
    num_truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)

    def add(self, example: EncodedExample) -> None:
        if example.dropped_reason:
            self.dropped[example.dropped_reason] = self.dropped.get(example.dropped_reason, 0) + 1
            return
        length = len(example.tokens)
        self.num_tokens += length
        self.num_target_tokens += example.mask.count(1)
        self.longest_tokens = max(self.longest_tokens, length)
        self.num_truncated += example.truncated
        bucket = 1 << (length.bit_length() - 1)
        self.lengths[bucket] = self.lengths.get(bucket, 0) + 1

    def to_json(self) -> dict[str, Any]:
        """Buckets from the shortest to the longest, with those between them that are empty."""
        buckets, bucket = [], min(self.lengths, default=0)
        while bucket and bucket <= max(self.lengths):
            buckets.append({"minimum": str(bucket), "count": str(self.lengths.get(bucket, 0))})
            bucket *= 2
        return {
            "base_model": self.base_model,
            "num_tokens": str(self.num_tokens),
            "num_target_tokens": str(self.num_target_tokens),
            "longest_tokens": str(self.longest_tokens),
            "num_truncated": str(self.num_truncated),
            "dropped": {reason: str(count) for reason, count in sorted(self.dropped.items())},
            "lengths": buckets,
        }


def describe_example(example: EncodedExample, tokenizer: TextTokenizer) -> dict[str, Any]:
    """`RenderedExample` as proto JSON."""
    end = example.rejected_start or len(example.tokens)
    halves = [
        list(_segments(example, start, stop, tokenizer)) for start, stop in ((0, end), (end, len(example.tokens)))
    ]
    return {
        "segments": halves[0],
        "rejected_segments": halves[1],
        "num_tokens": len(example.tokens),
        "num_target_tokens": example.mask.count(1),
        "truncated": example.truncated,
        "dropped_reason": example.dropped_reason,
    }


def _segments(example: EncodedExample, start: int, stop: int, tokenizer: TextTokenizer) -> Iterator[dict[str, Any]]:
    """Runs of tokens alike in mask, whose texts put together are the text of all.

    A run is decoded after the one before it: alone, a decoder may leave out the space that it begins with.
    """
    before: list[int] = []
    while start < stop:
        mask = example.mask[start]
        end = next((at for at in range(start, stop) if example.mask[at] != mask), stop)
        tokens = list(example.tokens[start:end])
        text = tokenizer.decode(before + tokens)[len(tokenizer.decode(before)) :]
        yield {"text": text, "is_target": mask == 1, "num_tokens": len(tokens)}
        before, start = tokens, end


def _fit(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows for as long as their texts fit a message."""
    size_bytes = 0
    for row in rows:
        texts = [segment["text"] for segment in (*row["segments"], *row["rejected_segments"])]
        size_bytes += sum(len(text.encode()) + _SEGMENT_BYTES for text in texts)
        if size_bytes > MAXIMUM_TEXT_BYTES:
            return
        yield row
