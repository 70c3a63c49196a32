"""Tokens of chosen rows of a dataset: from the cache, or made now and kept. Chooses no row.

A shard in the cache has either every row of its dataset or the rows that one plan's data drew. A row that nobody asks
for is never tokenized, but where a plan wants them all.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

from gpu_service.catalog import datasets as dataset_formats
from gpu_service.domain.planned_data import PlannedDataDamaged, TokenShard
from gpu_service.domain.spec import DatasetReference
from gpu_service.planner.chat_template import ChatTemplate
from gpu_service.planner.encoding import EncodedExample, ExampleEncoder, split_batches
from gpu_service.planner.progress import Progress
from gpu_service.planner.row_index import RowIndex, open_index
from gpu_service.planner.row_rendering import RowRenderer
from gpu_service.planner.shard_writer import ShardWriter
from gpu_service.planner.staging import stage_directory
from gpu_service.planner.toolchain import Toolchain

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class RowTokens:
    """What a row came to. `example_index` is its place in the shard; None when it was left out, for this reason."""

    example_index: int | None
    num_tokens: int = 0
    num_target_tokens: int = 0
    truncated: bool = False
    dropped_reason: str = ""


class TokenStore(Protocol):
    """Rows of one dataset as tokens."""

    def read(self, rows: Sequence[int]) -> list[RowTokens]:
        """What these rows come to, in their order. Raises `Refusal` as reading, rendering and tokenizing do."""
        ...

    def close(self) -> TokenShard:
        """The shard that has every row that was read."""
        ...


class KeptStore:
    """A shard that is in the cache. With `progress` None its rows were counted when they were tokenized."""

    def __init__(self, shard: TokenShard, progress: Progress | None) -> None:
        self._shard = shard
        self._progress = progress
        self._dropped = {row: reason for reason, rows in shard.facts["dropped"].items() for row in rows}
        self._examples = array("i")
        for example_index in range(shard.num_examples):
            row = shard.row(example_index)
            if row >= len(self._examples):
                self._examples.extend([-1] * (row + 1 - len(self._examples)))
            self._examples[row] = example_index

    def read(self, rows: Sequence[int]) -> list[RowTokens]:
        if self._progress is not None:
            self._progress.advance(len(rows))
        return [self._find(row) for row in rows]

    def close(self) -> TokenShard:
        return self._shard

    def _find(self, row: int) -> RowTokens:
        reason = self._dropped.get(row)
        if reason is not None:
            return RowTokens(None, dropped_reason=reason)
        example_index = self._examples[row] if row < len(self._examples) else -1
        if example_index < 0:
            raise PlannedDataDamaged(f"{self._shard.directory}: has not row {row}, which it must have been made for")
        example = self._shard.example(example_index)
        return RowTokens(
            example_index,
            len(example.tokens),
            bytes(example.mask).count(1),
            self._shard.was_truncated(example_index),
        )


class FreshStore:
    """A shard in the making; it is in its place once it is closed."""

    def __init__(self, target: Path, index: RowIndex, encoder: "RowEncoder", progress: Progress) -> None:
        self._target = target
        self._index = index
        self._encoder = encoder
        self._progress = progress
        self.files = ExitStack()
        staged = self.files.enter_context(stage_directory(target, is_whole=is_whole_shard))
        self._writer = ShardWriter(staged, has_pairs=encoder.has_pairs)
        self.files.callback(self._writer.close)
        self._shard: TokenShard | None = None

    def read(self, rows: Sequence[int]) -> list[RowTokens]:
        results = []
        for row, example in self._encoder.encode(self._index, rows):
            example_index = self._writer.add(row, example)
            results.append(
                RowTokens(
                    example_index,
                    len(example.tokens),
                    example.mask.count(1),
                    example.truncated,
                    example.dropped_reason,
                )
            )
            self._progress.advance(1)
        return results

    def close(self) -> TokenShard:
        if self._shard is None:
            self._writer.finish()
            self.files.close()
            self._shard = TokenShard(self._target)
        return self._shard


class RowEncoder:
    """Rows of one dataset to examples, by its format and the plan's template and tokenizer."""

    def __init__(self, reference: DatasetReference, encoder: ExampleEncoder, chat: ChatTemplate | None) -> None:
        self.has_pairs = dataset_formats.REGISTRY[reference.format].is_preference
        self._renderer = RowRenderer(reference, chat)
        self._encoder = encoder

    def encode(self, index: RowIndex, rows: Sequence[int]) -> Iterator[tuple[int, EncodedExample]]:
        """Row and example of each of these, a group of rows in memory at a time."""
        remaining = iter(rows)
        for batch in split_batches(
            self._renderer.render(partial(index.find_line, row), index.read(row)) for row in rows
        ):
            yield from zip([next(remaining) for _ in batch], self._encoder.encode(batch), strict=True)


class TokenStores:
    """The stores of one plan; a context: what is not closed when an exception leaves it is as if it had never been."""

    def __init__(
        self,
        *,
        blobs_directory: Path,
        cache_directory: Path,
        tools: Toolchain,
        progress: Progress,
    ) -> None:
        self._blobs_directory = blobs_directory
        self._cache_directory = cache_directory
        self._settings = tools.settings
        self._encoder = ExampleEncoder(
            tools.tokenizer, loss_on_all=tools.settings.loss_on == "all", max_length=tools.settings.max_length
        )
        self._chat = tools.chat
        self._progress = progress
        self._indices: dict[str, RowIndex] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "TokenStores":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def index(self, reference: DatasetReference) -> RowIndex:
        """Where the dataset's rows are. Raises `Refusal` as `row_index.open_index` does."""
        if reference.sha256 not in self._indices:
            self._indices[reference.sha256] = open_index(
                reference, blobs_directory=self._blobs_directory, rows_directory=self._cache_directory / "rows"
            )
        return self._indices[reference.sha256]

    def open_whole(self, reference: DatasetReference) -> TokenStore:
        """Every row of the dataset, tokenized in the order of the file, whatever the plan."""
        target = self._whole(reference)
        if is_whole_shard(target):
            return KeptStore(TokenShard(target), self._progress)
        store, num_rows = self._open(target, reference), self.index(reference).num_rows
        with store.files:
            for start in range(0, num_rows, _ROWS_AT_ONCE):
                store.read(range(start, min(start + _ROWS_AT_ONCE, num_rows)))
            return KeptStore(store.close(), None)

    def open_drawn(self, reference: DatasetReference, purpose: Mapping[str, object]) -> TokenStore:
        """The rows that a plan draws for `purpose`, which must decide which rows these are."""
        whole = self._whole(reference)
        facts = {"shard": whole.name, **purpose}
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        target = whole.with_name(name)
        for kept in (whole, target):
            if is_whole_shard(kept):
                return KeptStore(TokenShard(kept), self._progress)
        store = self._open(target, reference)
        self._stack.push(store.files)
        return store

    def _whole(self, reference: DatasetReference) -> Path:
        return self._cache_directory / "tokens" / self._settings.key(reference)

    def _open(self, target: Path, reference: DatasetReference) -> FreshStore:
        encoder = RowEncoder(reference, self._encoder, self._chat)
        return FreshStore(target, self.index(reference), encoder, self._progress)


def is_whole_shard(directory: Path) -> bool:
    """Whether a shard is there that can be read."""
    if not directory.is_dir():
        return False
    try:
        TokenShard(directory)
    except PlannedDataDamaged:
        return False
    return True
