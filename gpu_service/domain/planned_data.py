"""A plan directory opened for reading: which examples make a step, and their tokens. Memory maps only.

It checks every length and bound it relies on and raises `PlannedDataDamaged` instead of reading beyond one; it writes
nothing. `gpu_service.planner` writes what is read here; the names of the files are declared here, once.
"""

import itertools
import json
import mmap
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpu_service.domain.data_digest import ENTRY_BYTES, MAXIMUM_LISTED_EXAMPLES, DataDigest, make_entry
from gpu_service.domain.order import ORDER_VERSION
from gpu_service.domain.planned_steps import CountedSteps, ListedSteps, PlannedSteps

PLAN_FILE = "plan.json"
DATA_FILE = "data.json"
SELECTION_FILE = "selection.bin"
HELD_OUT_FILE = "held_out.bin"
# Only where a batch counts tokens.
STEP_PLACES_FILE = "steps.bin"
STEP_OFFSETS_FILE = "step_offsets.bin"
SHARD_FILE = "shard.json"
OFFSETS_FILE = "offsets.bin"
TOKENS_FILE = "tokens.bin"
MASK_FILE = "mask.bin"
FLAGS_FILE = "flags.bin"
REJECTED_FILE = "rejected.bin"
ROWS_FILE = "rows.bin"
# Layout of the files; a reader refuses another.
DATA_VERSION = 2

_REFERENCE = struct.Struct("<II")


class PlannedDataDamaged(Exception):
    """A file of a plan directory or token shard is missing, short, or contradicts another; the message names it."""


class ExampleReference(NamedTuple):
    """`source_index` counts `PlannedData.sources`; `example_index` counts the examples of that source's shard."""

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
    """One dataset of one trait, or what is held out of it, which is never trained on.

    `num_examples` are the examples of its token shard, of which the plan may use only some.
    """

    trait_type: str
    dataset_id: int
    held_out: bool
    num_examples: int


class TokenShard:
    """The tokens and masks of rows of one dataset; example `index` lies between two entries of the offsets."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.facts = _read_json(directory / SHARD_FILE)
        self.num_examples = _whole(self.facts, "num_examples", directory / SHARD_FILE)
        num_tokens = _whole(self.facts, "num_tokens", directory / SHARD_FILE)
        self._offsets = map_file(directory / OFFSETS_FILE, 8 * (self.num_examples + 1)).cast("Q")
        self._tokens = map_file(directory / TOKENS_FILE, 4 * num_tokens).cast("i")
        self._mask = map_file(directory / MASK_FILE, num_tokens)
        self._flags = map_file(directory / FLAGS_FILE, self.num_examples)
        self._rows = map_file(directory / ROWS_FILE, 4 * self.num_examples).cast("I")
        # True: every example is a preference pair.
        self.has_pairs = self.facts.get("has_pairs") is True
        self._rejected = map_file(directory / REJECTED_FILE, 4 * self.num_examples if self.has_pairs else 0).cast("I")
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

    def row(self, index: int) -> int:
        """Which row of the dataset the example was made of, from 0."""
        return self._rows[index]


class PlannedData:
    """Everything that training reads. Open with `PlannedData.open`; safe to read from several threads."""

    def __init__(
        self,
        *,
        plan: Mapping[str, Any],
        sources: Sequence[Source],
        shards: Sequence[TokenShard],
        selection: memoryview,
        held_out: memoryview,
        steps: PlannedSteps,
        batch: str,
        seed: int,
    ) -> None:
        """`selection` and `held_out` are pairs of uint32, see `ExampleReference`; `batch` is e.g. `examples 8`."""
        self.plan = plan
        self.sources = tuple(sources)
        self.total_examples = steps.total_examples
        self.num_steps = steps.num_steps
        self.examples_per_epoch = len(selection) // _REFERENCE.size
        self._shards = shards
        self._selection = selection
        self._held_out = held_out
        self._steps = steps
        self._batch = batch
        self._seed = seed

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
        batch = data.get("batch")
        if not isinstance(batch, dict) or len(batch) != 1:
            raise PlannedDataDamaged(f"{path}: does not say what makes a step")
        [(unit, size)] = batch.items()
        return cls(
            plan=plan,
            sources=sources,
            shards=shards,
            selection=_open_references(directory / SELECTION_FILE, _whole(data, "examples_per_epoch", path), sources),
            held_out=_open_references(directory / HELD_OUT_FILE, _whole(data, "held_out_examples", path), sources),
            steps=_open_steps(directory, data),
            batch=f"{unit} {size}",
            seed=_whole(data, "seed", path),
        )

    def step_examples(self, step: int) -> list[ExampleReference]:
        """The examples of a step, from step 0. Raises `IndexError` outside."""
        if not 0 <= step < self.num_steps:
            raise IndexError(step)
        return [
            ExampleReference(*_REFERENCE.unpack_from(self._selection, place * _REFERENCE.size))
            for place in self._steps.places(step)
        ]

    def example(self, reference: ExampleReference | tuple[int, int]) -> Example:
        """The tokens and mask of an example; views into the map, valid while this object lives."""
        source_index, example_index = reference
        if not 0 <= source_index < len(self._shards):
            raise IndexError(source_index)
        return self._shards[source_index].example(example_index)

    def row(self, reference: ExampleReference) -> int:
        """Which row of its dataset the example was made of, from 0; blank lines are none."""
        return self._shards[reference.source_index].row(reference.example_index)

    def held_out_examples(self) -> list[ExampleReference]:
        """Every held-out example, in the order of the sources."""
        return [ExampleReference(*pair) for pair in _REFERENCE.iter_unpack(self._held_out)]

    def epoch_of_step(self, step: int) -> float:
        """Passes over the mix once `step` steps are done: 0.0 before the first, `num_epochs` after the last."""
        return self._steps.count_examples(step) / self.examples_per_epoch

    def compute_digest(self, num_steps: int | None = None) -> str:
        """The data digest of the first `num_steps` steps (None: all), from the tokens themselves.

        Reads every example that is selected or held out, and the steps of the first 4,194,304 examples, or of the
        first epoch if that is longer.
        """
        num_steps = self.num_steps if num_steps is None else num_steps
        digest = DataDigest(
            [(source.trait_type, source.held_out) for source in self.sources], seed=self._seed, batch=self._batch
        )
        digest.add_held_out(self._make_entries(self._held_out))
        entries = self.selection_entries()
        digest.add_selection([entries])
        listed = max(self.examples_per_epoch, MAXIMUM_LISTED_EXAMPLES)
        for step in range(num_steps):
            if self._steps.count_examples(step) >= listed:
                break
            places = self._steps.places(step)
            digest.add_step(entries[place * ENTRY_BYTES : (place + 1) * ENTRY_BYTES] for place in places)
        return digest.finish(num_steps=num_steps, total_examples=self._steps.count_examples(num_steps))

    def selection_entries(self) -> bytearray:
        """What tells the examples of an epoch apart, `data_digest.ENTRY_BYTES` each, before it is shuffled."""
        entries = bytearray()
        # Not joined: that would hold an object for each first, three times the size of all.
        for entry in self._make_entries(self._selection):
            entries += entry
        return entries

    def _make_entries(self, references: memoryview) -> Iterator[bytes]:
        for source_index, example_index in _REFERENCE.iter_unpack(references):
            yield make_entry(source_index, self._shards[source_index].example(example_index))


def _open_references(path: Path, count: int, sources: Sequence[Source]) -> memoryview:
    references = map_file(path, _REFERENCE.size * count)
    for source_index, example_index in _REFERENCE.iter_unpack(references):
        if source_index >= len(sources) or example_index >= sources[source_index].num_examples:
            raise PlannedDataDamaged(f"{path}: names an example that is not there")
    return references


def _open_steps(directory: Path, data: Mapping[str, Any]) -> PlannedSteps:
    path = directory / DATA_FILE
    per_epoch, total_examples = _whole(data, "examples_per_epoch", path), _whole(data, "total_examples", path)
    if not (per_epoch and total_examples):
        raise PlannedDataDamaged(f"{path}: plans no example")
    batch: Mapping[str, Any] = data["batch"]
    if "examples" in batch:
        return CountedSteps(
            examples_per_epoch=per_epoch,
            batch_examples=_whole(batch, "examples", path) or 1,
            total_examples=total_examples,
            seed=_whole(data, "seed", path),
        )
    num_steps = _whole(data, "num_steps", path)
    offsets = map_file(directory / STEP_OFFSETS_FILE, 8 * (num_steps + 1)).cast("Q")
    places = map_file(directory / STEP_PLACES_FILE, 4 * total_examples).cast("I")
    rises = all(first < second for first, second in itertools.pairwise(offsets))
    if offsets[0] or offsets[num_steps] != total_examples or not rises:
        raise PlannedDataDamaged(f"{directory / STEP_OFFSETS_FILE}: the offsets do not span the steps")
    if max(places) >= per_epoch:
        raise PlannedDataDamaged(f"{directory / STEP_PLACES_FILE}: names a place that is not there")
    return ListedSteps(places=places, offsets=offsets)


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


def map_file(path: Path, size_bytes: int) -> memoryview:
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
