"""Counts of a run: examples of each dataset, steps, epochs. Reads no data: it is told how many examples there are."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from gpu_service.domain.checked_plan import DatasetPlan
from gpu_service.domain.defaults import DEFAULT_BATCH_EXAMPLES, ResolvedMix
from gpu_service.domain.errors import refuse_user
from gpu_service.domain.mix import MixSource, allocate
from gpu_service.domain.spec import Hyperparameters, Trait

# A planner holds some 30 bytes for each in memory.
MAXIMUM_EXAMPLES_PER_EPOCH = 50_000_000


def count_run(given: Hyperparameters, examples_per_epoch: int) -> tuple[float, int, int]:
    """Epochs, steps and examples of the whole run.

    Batches run on across the ends of epochs, so every step is full but, where epochs were asked for, the run's last.
    """
    batch = given.batch.examples or DEFAULT_BATCH_EXAMPLES
    if given.num_steps is not None:
        total = given.num_steps * batch
        return total / examples_per_epoch, given.num_steps, total
    epochs = 1.0 if given.num_epochs is None else given.num_epochs
    total = max(1, int(Fraction(str(epochs)) * examples_per_epoch + Fraction(1, 2)))
    return epochs, -(-total // batch), total


def plan_datasets(
    traits: Sequence[Trait], sources: Sequence[MixSource], mix: ResolvedMix, available: Mapping[int, int]
) -> tuple[DatasetPlan, ...]:
    """What each source gives per epoch, in the order of `sources`, then the held-out datasets by trait and id.

    `available` are the usable examples by dataset id. Raises `Refusal` as `mix.allocate` does,
    and TOO_LARGE.
    """
    there = [available[source.dataset_id] for source in sources]
    counts = allocate(sources, there, total=mix.total, policy=mix.policy, max_repeats=mix.max_repeats)
    if sum(counts) > MAXIMUM_EXAMPLES_PER_EPOCH:
        raise refuse_user(
            "TOO_LARGE",
            f"the mix comes to {sum(counts):,} examples an epoch; {MAXIMUM_EXAMPLES_PER_EPOCH:,} is the most",
            field="mix.total",
            stage="PLANNING",
        )
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
    held_out = sorted((trait.trait_type, dataset_id) for trait in traits for dataset_id in trait.held_out_dataset_ids)
    planned += [
        DatasetPlan(
            trait_type=trait_type,
            dataset_id=dataset_id,
            num_available=available[dataset_id],
            num_examples=available[dataset_id],
            num_repeats=1,
            held_out=True,
        )
        for trait_type, dataset_id in held_out
    ]
    return tuple(planned)
