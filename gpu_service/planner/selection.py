"""What was chosen as an epoch, the steps of a run over it, and what these come to in tokens. Tokenizes nothing."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpu_service.domain.counts import MAXIMUM_EXAMPLES_PER_EPOCH, count_examples, count_run, too_large
from gpu_service.domain.data_digest import ENTRY_BYTES, MAXIMUM_LISTED_EXAMPLES
from gpu_service.domain.defaults import DEFAULT_BATCH_EXAMPLES
from gpu_service.domain.order import epoch_order
from gpu_service.domain.packing import TooManyExamples, pack
from gpu_service.domain.planned_steps import CountedSteps, ListedSteps, PlannedSteps
from gpu_service.domain.spec import Hyperparameters
from gpu_service.planner.choosing import ChosenSource

# Duplicates are looked for among so many examples at a time.
_DUPLICATES_AT_ONCE = 500_000


@dataclass(frozen=True, kw_only=True)
class Selection:
    """An epoch before it is shuffled, in arrays, because it may be long.

    Example i is `references[2 * i]` (source) and `references[2 * i + 1]` (its example in the source's shard), with its
    tokens and targets. `held_out` has references likewise.
    """

    references: "array[int]"
    num_tokens: "array[int]"
    num_target_tokens: "array[int]"
    held_out: "array[int]"
    seed: int

    def __len__(self) -> int:
        return len(self.num_tokens)


@dataclass(frozen=True, kw_only=True)
class RunSteps:
    """The steps of a whole run. `packed` are their places and offsets where a batch counts tokens, else None."""

    steps: PlannedSteps
    num_epochs: float
    packed: "tuple[array[int], array[int]] | None"


@dataclass(kw_only=True, slots=True)
class RunCount:
    """What one source gives to a whole run."""

    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0


def select(sources: Sequence[ChosenSource], *, seed: int) -> Selection:
    """The references of everything that was chosen, in the order of the sources."""
    selection = Selection(
        references=array("I"),
        num_tokens=array("I"),
        num_target_tokens=array("I"),
        held_out=array("I"),
        seed=seed,
    )
    for source_index, source in enumerate(sources):
        draw = source.draw
        references = selection.held_out if source.plan.held_out else selection.references
        for position in source.positions:
            references.append(source_index)
            references.append(draw.examples[position])
        if not source.plan.held_out:
            selection.num_tokens.extend(draw.tokens[position] for position in source.positions)
            selection.num_target_tokens.extend(draw.targets[position] for position in source.positions)
    return selection


def make_steps(given: Hyperparameters, selection: Selection) -> RunSteps:
    """The run's steps by what its batch counts. Raises `Refusal` TOO_LARGE where they would have to be listed."""
    if given.batch.tokens is None:
        num_epochs, _, total_examples = count_run(given, len(selection))
        steps = CountedSteps(
            examples_per_epoch=len(selection),
            batch_examples=given.batch.examples or DEFAULT_BATCH_EXAMPLES,
            total_examples=total_examples,
            seed=selection.seed,
        )
        return RunSteps(steps=steps, num_epochs=num_epochs, packed=None)
    num_epochs, total = (0.0, None) if given.num_steps is not None else count_examples(given, len(selection))
    try:
        run = pack(
            selection.num_tokens,
            tokens_per_step=given.batch.tokens,
            seed=selection.seed,
            total_examples=total,
            num_steps=given.num_steps,
            most_examples=MAXIMUM_EXAMPLES_PER_EPOCH,
        )
    except TooManyExamples as error:
        field = "hyperparameters.num_epochs" if given.num_steps is None else "hyperparameters.num_steps"
        raise too_large("the steps of the run list too many examples", field=field) from error
    return RunSteps(
        steps=ListedSteps(places=run.places, offsets=run.offsets),
        num_epochs=num_epochs or len(run.places) / len(selection),
        packed=(run.places, run.offsets),
    )


def count_sources(selection: Selection, run: RunSteps) -> dict[int, RunCount]:
    """What each source (by index) gives to the run. Sources that give nothing are not in it."""
    counts: dict[int, RunCount] = {}
    if run.packed is not None:
        _count(selection, run.packed[0], 1, counts)
        return counts
    # Whole epochs are alike, however many there are.
    epochs, rest = divmod(run.steps.total_examples, len(selection))
    if epochs:
        _count(selection, range(len(selection)), epochs, counts)
    order = epoch_order(len(selection), seed=selection.seed, epoch=epochs)
    _count(selection, order.read(0, rest), 1, counts)
    return counts


def find_largest_step(selection: Selection, run: RunSteps) -> int:
    """Tokens of the largest step, of those within the first 4,194,304 examples (or the first epoch, if longer)."""
    largest, listed = 0, max(len(selection), MAXIMUM_LISTED_EXAMPLES)
    num_tokens = selection.num_tokens
    for step in range(run.steps.num_steps):
        if run.steps.count_examples(step) >= listed:
            break
        largest = max(largest, sum(num_tokens[place] for place in run.steps.places(step)))
    return largest


def count_duplicates(selection: Selection, entries: bytes | bytearray) -> int:
    """Examples that are exactly like an earlier one of their source; one that is repeated counts once.

    `entries` tell examples from each other, `ENTRY_BYTES` each, in the order of the selection.
    """
    num_groups = 1 + len(selection) // _DUPLICATES_AT_ONCE
    groups = [array("I") for _ in range(num_groups)]
    for place in range(len(selection)):
        # The byte after the source's index is of a digest: it spreads evenly. Equal examples share a group.
        groups[entries[place * ENTRY_BYTES + 4] % num_groups].append(place)
    num_duplicates = 0
    for group in groups:
        # Both as integers and bytes alone, and of one group at a time: all of a long epoch would take gigabytes.
        examples = {selection.references[2 * place] << 32 | selection.references[2 * place + 1] for place in group}
        contents = {bytes(entries[place * ENTRY_BYTES : (place + 1) * ENTRY_BYTES]) for place in group}
        num_duplicates += len(examples) - len(contents)
    return num_duplicates


def _count(selection: Selection, places: Iterable[int], times: int, counts: dict[int, RunCount]) -> None:
    for place in places:
        count = counts.setdefault(selection.references[2 * place], RunCount())
        count.examples += times
        count.tokens += times * selection.num_tokens[place]
        count.target_tokens += times * selection.num_target_tokens[place]
