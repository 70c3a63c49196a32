"""Shares and percentages to counts of examples, exactly. Reads no data: it is told how many examples there are.

Counts come from the largest remainder with ties to the lower dataset id, over exact fractions of the decimal numbers
that the spec shows, so that they are the same everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from gpu_service.domain.errors import Refusal, refuse_user
from gpu_service.domain.spec import Trait

# Totals tried one by one below the upper bound before bisecting; see `find_largest_total`.
_MAXIMUM_SCAN = 4096
_PERCENTAGE_TOLERANCE = Fraction(1, 100)


@dataclass(frozen=True, kw_only=True)
class MixSource:
    """One dataset of one trait with its part of the whole mix; the shares of a mix add up to 1."""

    trait_type: str
    dataset_id: int
    share: Fraction


def compute_sources(traits: Sequence[Trait]) -> list[MixSource]:
    """The sources of a mix, ordered by trait and dataset id, so that the spec's order of writing means nothing.

    share = weight / sum of weights x percentage / 100. Percentages may miss 100 by 0.01 and then count in proportion.
    Raises `Refusal`: WEIGHTS_ALL_ZERO, PERCENTAGES_NOT_100, INVALID_FIELD (no trait, a negative number, one twice).
    """
    if not traits:
        raise refuse_user("INVALID_FIELD", "there is no trait to train", field="traits")
    weights = [
        _exact(1 if trait.weight is None else trait.weight, f"traits[{at}].weight") for at, trait in enumerate(traits)
    ]
    total_weight = sum(weights, Fraction())
    if not total_weight:
        raise refuse_user("WEIGHTS_ALL_ZERO", "every trait's weight is zero", field="traits")
    sources: dict[tuple[str, int], MixSource] = {}
    for at, (trait, weight) in enumerate(zip(traits, weights, strict=True)):
        percentages = [
            _exact(dataset.percentage, f"traits[{at}].datasets[{inner}].percentage")
            for inner, dataset in enumerate(trait.datasets)
        ]
        total_percentage = sum(percentages, Fraction())
        if abs(total_percentage - 100) > _PERCENTAGE_TOLERANCE:
            raise refuse_user(
                "PERCENTAGES_NOT_100",
                f"the percentages of trait {trait.trait_type!r} add up to {float(total_percentage):g}, not 100",
                field=f"traits[{at}].datasets",
                trait_type=trait.trait_type,
            )
        for dataset, percentage in zip(trait.datasets, percentages, strict=True):
            key = (trait.trait_type, dataset.dataset_id)
            if key in sources:
                raise refuse_user(
                    "INVALID_FIELD",
                    f"trait {trait.trait_type!r} names dataset {dataset.dataset_id} twice",
                    field=f"traits[{at}].datasets",
                )
            share = weight / total_weight * percentage / total_percentage
            sources[key] = MixSource(trait_type=trait.trait_type, dataset_id=dataset.dataset_id, share=share)
    return [sources[key] for key in sorted(sources)]


def allocate(
    sources: Sequence[MixSource], available: Sequence[int], *, total: int | None, policy: str, max_repeats: int
) -> list[int]:
    """Examples per epoch of each source.

    `available[i]` are the valid examples of `sources[i]`. With `total` None: the largest total at which no source
    exceeds its policy. Raises `Refusal` MIX_INFEASIBLE naming the first source that cannot give its part,
    NO_EXAMPLES_LEFT when nothing would be trained on.
    """
    refuse_without_examples(sources, available)
    limits = [count * max_repeats if policy == "repeat" else count for count in available]
    largest = find_largest_total(sources, limits)
    if total is None:
        total = largest
    elif policy == "shrink":
        total = min(total, largest)
    counts = apportion(sources, total)
    for source, wanted, limit, count in zip(sources, counts, limits, available, strict=True):
        if wanted > limit:
            repeats = f", even repeated {max_repeats} times" if policy == "repeat" else ""
            raise infeasible(source, wanted, count, f"has {count} examples{repeats}, and the mix wants {wanted} of it")
    if not sum(counts):
        raise refuse_user("NO_EXAMPLES_LEFT", "the mix comes to no example at all", stage="PLANNING", field="mix")
    return counts


def refuse_without_examples(sources: Sequence[MixSource], available: Sequence[int]) -> None:
    """Raises `Refusal` MIX_INFEASIBLE naming the first source that has a share and no example to train on."""
    for source, count in zip(sources, available, strict=True):
        if source.share and not count:
            raise infeasible(source, 1, count, "has no example to train on, and its share is not 0")


def apportion(sources: Sequence[MixSource], total: int) -> list[int]:
    """`total` split by share: whole parts first, what is left by largest remainder, ties to the lower dataset id."""
    quotas = [source.share * total for source in sources]
    counts = [int(quota) for quota in quotas]
    order = sorted(
        range(len(sources)),
        key=lambda index: (counts[index] - quotas[index], sources[index].dataset_id, sources[index].trait_type),
    )
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts


def find_largest_total(sources: Sequence[MixSource], limits: Sequence[int]) -> int:
    """The largest total whose apportionment stays within every limit.

    Rounding makes this not quite monotone, so totals are tried from the upper bound down. With a share so small that
    more than 4,096 would have to be tried, it is a total that fits while the next one does not.
    """
    bounded = [(source, limit) for source, limit in zip(sources, limits, strict=True) if source.share]

    def fits(total: int) -> bool:
        return all(count <= limit for count, limit in zip(apportion(sources, total), limits, strict=True))

    # A count is its quota rounded down or up: below `safe` no limit can be passed, above `highest` one must be.
    safe = min(int(limit / source.share) for source, limit in bounded)
    highest = min(-int(-(limit + 1) // source.share) - 1 for source, limit in bounded)
    lowest_scanned = max(safe, highest - _MAXIMUM_SCAN)
    for total in range(highest, lowest_scanned, -1):
        if fits(total):
            return total
    upper = lowest_scanned + 1
    while upper - safe > 1:
        middle = (safe + upper) // 2
        safe, upper = (middle, upper) if fits(middle) else (safe, middle)
    return safe


def _exact(value: float, field: str) -> Fraction:
    """The decimal number that was written, not its binary neighbor: 0.1 is one tenth."""
    exact = Fraction(str(value))
    if exact < 0:
        raise refuse_user("INVALID_FIELD", f"{field} is negative", field=field)
    return exact


def infeasible(source: MixSource, wanted: int, available: int, why: str) -> Refusal:
    """The refusal of a mix that this source cannot give its part of; numbers are in the mix's unit."""
    return refuse_user(
        "MIX_INFEASIBLE",
        f"dataset {source.dataset_id} of trait {source.trait_type!r} {why}",
        field="mix",
        stage="PLANNING",
        dataset_id=source.dataset_id,
        trait_type=source.trait_type,
        wanted=wanted,
        available=available,
    )
