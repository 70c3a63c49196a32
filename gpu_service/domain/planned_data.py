"""A plan directory opened for reading: which examples make a step, and their tokens. Memory maps only.

It checks every length and bound it relies on and raises `PlannedDataDamaged` instead of reading beyond one; it writes
nothing. `gpu_service.planner` writes what is read here; the names of the files are declared here, once.
"""

import json
import mmap
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpu_service.domain.order import ORDER_VERSION, Permutation

PLAN_FILE = "plan.json"
DATA_FILE = "data.json"
SELECTION_FILE = "selection.bin"
SHARD_FILE = "shard.json"
OFFSETS_FILE = "offsets.bin"
TOKENS_FILE = "tokens.bin"
MASK_FILE = "mask.bin"
FLAGS_FILE = "flags.bin"
REJECTED_FILE = "rejected.bin"
# Layout of the files; a reader refuses another.
DATA_VERSION = 1

_REFERENCE = struct.Struct("<II")


class PlannedDataDamaged(Exception):
    """A file of a plan directory or token shard is missing, short, or contradicts another; the message names it."""


class ExampleReference(NamedTuple):
    """`source_index` counts `PlannedData.sources`; `example_index` counts the valid examples of that source."""

    source_index: int
    example_index: int


@dataclass(frozen=True)
class Example:
    """`tokens` is int32 [n]; `mask` is uint8 [n], 1 where the token carries loss as a target; `mask[0]` is 0.

    Of a preference pair, `tokens[:rejected_start]` is the prompt with the chosen answer and `tokens[rejected_start:]`
    the prompt with the rejected one: two sequences that see nothing of each other. The mask is 1 on the answers, and 0
    at `rejected_start`, which is 0 for an example that is no pair.
    """

    tokens: memoryview
    mask: memoryview
    rejected_start: int = 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of one trait. `num_examples` are its valid examples; a held-out source is never trained on."""

    trait_type: str
    dataset_id: int
    held_out: bool
    num_examples: int


class TokenShard:
    """The tokens and masks of one dataset; example `index` lies between two entries of the offsets."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.facts = _read_json(directory / SHARD_FILE)
        self.num_examples = _whole(self.facts, "num_examples", directory / SHARD_FILE)
        num_tokens = _whole(self.facts, "num_tokens", directory / SHARD_FILE)
        self._offsets = _map(directory / OFFSETS_FILE, 8 * (self.num_examples + 1)).cast("Q")
        self._tokens = _map(directory / TOKENS_FILE, 4 * num_tokens).cast("i")
        self._mask = _map(directory / MASK_FILE, num_tokens)
        self._flags = _map(directory / FLAGS_FILE, self.num_examples)
        # True: every example is a preference pair.
        self.has_pairs = self.facts.get("has_pairs") is True
        self._rejected = _map(directory / REJECTED_FILE, 4 * self.num_examples if self.has_pairs else 0).cast("I")
        if self._offsets[0] != 0 or self._offsets[self.num_examples] != num_tokens:
            raise PlannedDataDamaged(f"{directory / OFFSETS_FILE}: the offsets do not span the tokens")

    def example(self, index: int) -> Example:
        """Raises `IndexError` outside 0..num_examples-1, `PlannedDataDamaged` when its offsets make no sense."""
        if not 0 <= index < self.num_examples:
            raise IndexError(index)
        start, end = self._offsets[index], self._offsets[index + 1]
        if not start < end <= len(self._tokens):
            raise PlannedDataDamaged(f"{self.directory / OFFSETS_FILE}: example {index} has no valid extent")
        rejected_start = self._rejected[index] if self.has_pairs else 0
        if self.has_pairs and not 0 < rejected_start < end - start:
            raise PlannedDataDamaged(f"{self.directory / REJECTED_FILE}: example {index} has no two answers")
        return Example(tokens=self._tokens[start:end], mask=self._mask[start:end], rejected_start=rejected_start)

    def was_truncated(self, index: int) -> bool:
        """Whether the example was cut at the plan's max_length."""
        return self._flags[index] != 0


class PlannedData:
    """Everything that training reads. Open with `PlannedData.open`; safe to read from several threads."""

    def __init__(
        self,
        *,
        plan: Mapping[str, Any],
        sources: Sequence[Source],
        shards: Sequence[TokenShard],
        selection: memoryview,
        batch_examples: int,
        total_examples: int,
        seed: int,
    ) -> None:
        self.plan = plan
        self.sources = tuple(sources)
        self.total_examples = total_examples
        self.num_steps = -(-total_examples // batch_examples)
        self._shards = shards
        self._selection = selection
        self._examples_per_epoch = len(selection) // _REFERENCE.size
        self._batch_examples = batch_examples
        self._seed = seed
        self._epoch_order: tuple[int, Permutation] | None = None

    @classmethod
    def open(cls, plan_directory: Path | str) -> "PlannedData":
        """Opens what the planner left. Raises `PlannedDataDamaged`; the shards must still be in the same cache."""
        if sys.byteorder != "little":
            raise PlannedDataDamaged("token shards are little-endian and this machine is not")
        directory = Path(plan_directory)
        plan = _read_json(directory / PLAN_FILE)
        path = directory / DATA_FILE
        data = _read_json(path)
        if data.get("version") != DATA_VERSION or data.get("order_version") != ORDER_VERSION:
            raise PlannedDataDamaged(f"{path}: written in another layout; plan again")
        rows = data.get("sources")
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise PlannedDataDamaged(f"{path}: lists no sources")
        opened: dict[str, TokenShard] = {}
        sources, shards = [], []
        for row in rows:
            name = _text(row, "shard", path)
            if name not in opened:
                opened[name] = TokenShard(directory / name)
            shards.append(opened[name])
            sources.append(
                Source(
                    trait_type=_text(row, "trait_type", path),
                    dataset_id=_whole(row, "dataset_id", path),
                    held_out=row.get("held_out") is True,
                    num_examples=opened[name].num_examples,
                )
            )
        per_epoch = _whole(data, "examples_per_epoch", path)
        batch_examples = _whole(data, "batch_examples", path)
        total_examples = _whole(data, "total_examples", path)
        if not (per_epoch and batch_examples and total_examples):
            raise PlannedDataDamaged(f"{path}: plans no example")
        selection = _map(directory / SELECTION_FILE, _REFERENCE.size * per_epoch)
        for source_index, example_index in _REFERENCE.iter_unpack(selection):
            if source_index >= len(sources) or example_index >= sources[source_index].num_examples:
                raise PlannedDataDamaged(f"{directory / SELECTION_FILE}: names an example that is not there")
        return cls(
            plan=plan,
            sources=sources,
            shards=shards,
            selection=selection,
            batch_examples=batch_examples,
            total_examples=total_examples,
            seed=_whole(data, "seed", path),
        )

    def step_examples(self, step: int) -> list[ExampleReference]:
        """The examples of a step, from step 0. All steps are full but the last. Raises `IndexError` outside."""
        if not 0 <= step < self.num_steps:
            raise IndexError(step)
        start = step * self._batch_examples
        end = min(start + self._batch_examples, self.total_examples)
        return [self._reference_at(position) for position in range(start, end)]

    def example(self, reference: ExampleReference | tuple[int, int]) -> Example:
        """The tokens and mask of an example; views into the map, valid while this object lives."""
        source_index, example_index = reference
        if not 0 <= source_index < len(self._shards):
            raise IndexError(source_index)
        return self._shards[source_index].example(example_index)

    def held_out_examples(self) -> list[ExampleReference]:
        """Every example of every held-out source, in the order of the sources."""
        return [
            ExampleReference(source_index, example_index)
            for source_index, source in enumerate(self.sources)
            if source.held_out
            for example_index in range(source.num_examples)
        ]

    def epoch_of_step(self, step: int) -> float:
        """Passes over the mix once `step` steps are done: 0.0 before the first, `num_epochs` after the last."""
        return min(step * self._batch_examples, self.total_examples) / self._examples_per_epoch

    def _reference_at(self, position: int) -> ExampleReference:
        epoch, place = divmod(position, self._examples_per_epoch)
        # Read into a local: another thread may put another epoch here at any time.
        cached = self._epoch_order
        if cached is None or cached[0] != epoch:
            cached = (epoch, epoch_order(self._examples_per_epoch, seed=self._seed, epoch=epoch))
            self._epoch_order = cached
        return ExampleReference(*_REFERENCE.unpack_from(self._selection, cached[1][place] * _REFERENCE.size))


def epoch_order(examples_per_epoch: int, *, seed: int, epoch: int) -> Permutation:
    """The order in which an epoch visits the selection: the same selection each epoch, reshuffled."""
    return Permutation(examples_per_epoch, seed=seed, purpose=f"epoch {epoch}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise PlannedDataDamaged(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise PlannedDataDamaged(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise PlannedDataDamaged(f"{path}: is not an object")
    return value


def _whole(facts: Mapping[str, Any], name: str, path: Path) -> int:
    value = facts.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise PlannedDataDamaged(f"{path}: {name} is not a whole number")
    return value


def _text(facts: Mapping[str, Any], name: str, path: Path) -> str:
    value = facts.get(name)
    if not isinstance(value, str):
        raise PlannedDataDamaged(f"{path}: {name} is not text")
    return value


def _map(path: Path, size_bytes: int) -> memoryview:
    """Maps a file that must have exactly this size; an empty one cannot be mapped and is an empty view."""
    try:
        with path.open("rb") as file:
            found = file.seek(0, 2)
            if found != size_bytes:
                raise PlannedDataDamaged(f"{path}: has {found} bytes instead of {size_bytes}")
            if not size_bytes:
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise PlannedDataDamaged(f"{path}: {error.strerror}") from error
