"""Counts of a run: examples of each dataset, what is held out, steps, epochs. Reads no data: it is told how much it is.

At level CHECK, where no length is known, counts of a mix or a batch of tokens are upper bounds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from gpu_service.domain.checked_plan import DatasetPlan
from gpu_service.domain.defaults import DEFAULT_BATCH_EXAMPLES, ResolvedMix
from gpu_service.domain.errors import Refusal, refuse_user
from gpu_service.domain.mix import MixSource, allocate, refuse_without_examples
from gpu_service.domain.spec import Batch, DatasetReference, Hyperparameters, Trait

# A planner holds some 60 bytes for each in memory.
MAXIMUM_EXAMPLES_PER_EPOCH = 50_000_000
MAXIMUM_HELD_OUT_FRACTION = 0.5


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How many examples are held out by fraction: of each trait's dataset, and altogether of each dataset's content."""

    # By trait and dataset id; at least 1 each, but for an empty dataset.
    counts: Mapping[tuple[str, int], int]
    # By dataset id: so many are never trained on, by no trait.
    reserved: Mapping[int, int]


def count_held_out(
    traits: Sequence[Trait], references: Sequence[DatasetReference], num_examples: Mapping[int, int]
) -> HeldOut:
    """What `held_out_fraction` comes to: rounded to whole examples, a half up, and at least one of each dataset.

    Two traits that hold out parts of one dataset hold out the same examples first, so that the larger part has the
    smaller in it. Raises `Refusal` INVALID_FIELD for a fraction out of its range.
    """
    contents = {reference.dataset_id: content_of(reference) for reference in references}
    counts: dict[tuple[str, int], int] = {}
    largest: dict[str, int] = {}
    for at, trait in enumerate(traits):
        fraction = trait.held_out_fraction or 0.0
        if not 0 <= fraction <= MAXIMUM_HELD_OUT_FRACTION:
            field = f"traits[{at}].held_out_fraction"
            raise refuse_user("INVALID_FIELD", f"{field} is {fraction:g}, but must be from 0 to 0.5", field=field)
        if not fraction:
            continue
        for dataset in trait.datasets:
            there = num_examples[dataset.dataset_id]
            count = min(there, max(1, math.floor(Fraction(str(fraction)) * there + Fraction(1, 2))))
            if count:
                counts[trait.trait_type, dataset.dataset_id] = count
                content = contents[dataset.dataset_id]
                largest[content] = max(largest.get(content, 0), count)
    reserved = {dataset_id: largest.get(content, 0) for dataset_id, content in contents.items()}
    return HeldOut(counts=counts, reserved=reserved)


def count_run(given: Hyperparameters, examples_per_epoch: int) -> tuple[float, int, int]:
    """Epochs, steps and examples of a run whose batch counts examples.

    Batches run on across the ends of epochs, so every step is full but, where epochs were asked for, the run's last.
    """
    batch = given.batch.examples or DEFAULT_BATCH_EXAMPLES
    if given.num_steps is not None:
        total = given.num_steps * batch
        return total / examples_per_epoch, given.num_steps, total
    epochs, total = count_examples(given, examples_per_epoch)
    return epochs, -(-total // batch), total


def count_examples(given: Hyperparameters, examples_per_epoch: int) -> tuple[float, int]:
    """Epochs and examples of a run whose epochs were asked for, or nothing was: one epoch. A part is rounded."""
    epochs = 1.0 if given.num_epochs is None else given.num_epochs
    return epochs, max(1, math.floor(Fraction(str(epochs)) * examples_per_epoch + Fraction(1, 2)))


def bound_run(given: Hyperparameters, examples_per_epoch: int, *, longest_tokens: int) -> tuple[float, int, int]:
    """As `count_run` before lengths are known: epochs, and upper bounds of steps and examples.

    In a batch of tokens every step but the last has no room for another example, so it has at least as many as
    would fit were all `longest_tokens` long. Examples are 0 where nothing bounds them but the length of the run.
    """
    if given.batch.tokens is None:
        return count_run(given, examples_per_epoch)
    if given.num_steps is not None:
        return 0.0, given.num_steps, 0
    epochs, total = count_examples(given, examples_per_epoch)
    return epochs, -(-total // (given.batch.tokens // longest_tokens)), total


def check_batch(batch: Batch, *, longest_tokens: int, max_length: int) -> None:
    """Refuses a batch of fewer tokens than one example may have. Raises `Refusal` INVALID_FIELD."""
    if batch.tokens is not None and batch.tokens < longest_tokens:
        pairs = f", and a pair has two answers of it: {longest_tokens}" if longest_tokens > max_length else ""
        raise refuse_user(
            "INVALID_FIELD",
            f"a step of {batch.tokens} tokens has no room for an example of max_length {max_length}{pairs}; raise "
            "batch.tokens or lower max_length",
            field="hyperparameters.batch.tokens",
        )


def bound_datasets(
    traits: Sequence[Trait],
    sources: Sequence[MixSource],
    mix: ResolvedMix,
    references: Sequence[DatasetReference],
) -> tuple[DatasetPlan, ...]:
    """What each source gives per epoch as far as registered counts tell, in the order of `sources`; then the held out.

    Exact for a mix of examples none of which is dropped; of tokens, an upper bound: an example has at least one.
    Raises `Refusal` as `mix.allocate` does, INVALID_FIELD, and TOO_LARGE.
    """
    registered = {reference.dataset_id: reference.num_examples for reference in references}
    held_out = count_held_out(traits, references, registered)
    there = [registered[source.dataset_id] - held_out.reserved[source.dataset_id] for source in sources]
    if mix.unit == "examples":
        counts = allocate(sources, there, total=mix.total, policy=mix.policy, max_repeats=mix.max_repeats)
        check_size(sum(counts))
    else:
        refuse_without_examples(sources, there)
        repeats = mix.max_repeats if mix.policy == "repeat" else 1
        most = [math.inf if mix.total is None else math.ceil(source.share * mix.total) for source in sources]
        counts = [
            int(min(count * repeats, limit)) if source.share else 0
            for source, count, limit in zip(sources, there, most, strict=True)
        ]
    planned = [
        DatasetPlan(
            trait_type=source.trait_type,
            dataset_id=source.dataset_id,
            share=float(source.share),
            num_available=usable,
            num_examples=count,
            num_repeats=-(-count // usable) if usable else 0,
        )
        for source, usable, count in zip(sources, there, counts, strict=True)
    ]
    for trait_type, dataset_id in list_held_out(traits, held_out):
        count = held_out.counts.get((trait_type, dataset_id), registered[dataset_id])
        planned.append(
            DatasetPlan(
                trait_type=trait_type,
                dataset_id=dataset_id,
                num_available=count,
                num_examples=count,
                num_repeats=1,
                held_out=True,
            )
        )
    return tuple(planned)


def list_held_out(traits: Sequence[Trait], held_out: HeldOut) -> list[tuple[str, int]]:
    """Trait and dataset of everything that is held out, whole or in part, in the plan's order."""
    whole = {(trait.trait_type, dataset_id) for trait in traits for dataset_id in trait.held_out_dataset_ids}
    return sorted(whole.union(held_out.counts))


def check_size(examples_per_epoch: int, *, field: str = "mix.total") -> None:
    """Refuses more examples than a planner can hold. Raises `Refusal` TOO_LARGE."""
    if examples_per_epoch > MAXIMUM_EXAMPLES_PER_EPOCH:
        raise too_large(f"the mix comes to {examples_per_epoch:,} examples an epoch", field=field)


def too_large(what: str, *, field: str) -> Refusal:
    """The refusal of more than `MAXIMUM_EXAMPLES_PER_EPOCH`."""
    return refuse_user(
        "TOO_LARGE", f"{what}; {MAXIMUM_EXAMPLES_PER_EPOCH:,} is the most", field=field, stage="PLANNING"
    )


def content_of(reference: DatasetReference) -> str:
    """What tells datasets of other rows apart: by hash, or by id where no hash is known."""
    return reference.sha256 or f"dataset {reference.dataset_id}"
