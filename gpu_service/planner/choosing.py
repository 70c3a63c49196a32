"""Which examples each source gives to an epoch, and which are held out: shares carried out on real rows.

Tokenizes only what is drawn, and gives all that was drawn. A mix of examples draws exactly its counts; a mix of
tokens draws each source up to its part of the total, side by side with the others where the total may fall.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from gpu_service.domain.checked_plan import CheckedPlan, DatasetPlan
from gpu_service.domain.counts import HeldOut, check_size, count_held_out, list_held_out
from gpu_service.domain.errors import Refusal, refuse_user
from gpu_service.domain.mix import MixSource, allocate, infeasible, refuse_without_examples
from gpu_service.domain.order import Permutation
from gpu_service.domain.spec import DatasetReference, TrainingSpec
from gpu_service.planner.drawing import Draw, skip_rows
from gpu_service.planner.lockstep import draw_in_lockstep
from gpu_service.planner.token_store import TokenStore, TokenStores

# Part of the names of drawn shards: raise it when the same plan would draw other rows.
_DRAW_VERSION = 3
_UNIT_NAMES = {"examples": "examples", "tokens": "tokens", "target_tokens": "target tokens"}


@dataclass(frozen=True, kw_only=True)
class ChosenSource:
    """A source with what it gives: `positions` of its draw, again from the first where examples repeat."""

    plan: DatasetPlan
    draw: Draw
    positions: "array[int]"


class Chooser:
    """Carries out one plan's shares. `choose` is called once."""

    def __init__(self, spec: TrainingSpec, checked: CheckedPlan, stores: TokenStores) -> None:
        self._spec = spec
        self._stores = stores
        self._mix = checked.mix
        self._seed = checked.hyperparameters.seed
        self._max_length = checked.hyperparameters.max_length
        self._most_per_row = checked.longest_possible_tokens
        self._sources = checked.sources
        held = {item.dataset_id for item in checked.datasets if item.held_out}
        used = held.union(source.dataset_id for source in self._sources if source.share)
        self._num_rows = {
            reference.dataset_id: stores.index(reference).num_rows
            if reference.dataset_id in used
            else reference.num_examples
            for reference in spec.datasets
        }
        # By content: rows that are held out are 1. Two datasets of the same content share them.
        self._left_out: dict[str, bytearray] = {}

    def choose(self) -> tuple[list[ChosenSource], list[DatasetPlan]]:
        """Sources that give something or are held out, in the plan's order, and the plan's rows of those that do not.

        Raises `Refusal` MIX_INFEASIBLE, NO_EXAMPLES_LEFT, TOO_LARGE, and as reading rows does.
        """
        counts = count_held_out(self._spec.traits, self._spec.datasets, self._num_rows)
        held_out = [
            self._hold_out(trait_type, dataset_id, counts)
            for trait_type, dataset_id in list_held_out(self._spec.traits, counts)
        ]
        draws = self._open_draws()
        given = self._give_examples(draws) if self._mix.unit == "examples" else self._give_tokens(draws)
        check_size(sum(map(len, given)))
        trained, idle = [], []
        for source, draw, positions in zip(self._sources, draws, given, strict=True):
            if draw is None:
                there = self._num_rows[source.dataset_id]
                idle.append(
                    DatasetPlan(trait_type=source.trait_type, dataset_id=source.dataset_id, num_available=there)
                )
                continue
            row = DatasetPlan(
                trait_type=source.trait_type,
                dataset_id=source.dataset_id,
                share=float(source.share),
                num_repeats=-(-len(positions) // len(draw)) if len(draw) else 0,
            )
            trained.append(_describe(row, draw, positions))
        return trained + held_out, idle

    def _hold_out(self, trait_type: str, dataset_id: int, counts: HeldOut) -> ChosenSource:
        """A whole dataset in the order of its file, or a part that the seed chooses."""
        reference = self._spec.find_dataset(dataset_id)
        num_rows = self._num_rows[dataset_id]
        count = counts.counts.get((trait_type, dataset_id))
        if count is None:
            draw = self._draw(
                self._stores.open_whole(reference), reference, iter(range(num_rows)), num_rows, "examples"
            )
            draw.draw_examples(num_rows)
        else:
            # The same order for every trait: a smaller part lies in a larger one.
            order = Permutation(num_rows, seed=self._seed, purpose=f"held out {reference.sha256}")
            store = self._stores.open_drawn(reference, self._name("held out", count=count))
            draw = self._draw(store, reference, iter(order), num_rows, "examples")
            draw.draw_examples(count)
            left_out = self._left_out.setdefault(reference.sha256, bytearray(num_rows))
            for at in order.read(0, num_rows - draw.num_left):
                left_out[at] = 1
        if not len(draw):
            raise self._nothing_left(reference, draw)
        row = DatasetPlan(trait_type=trait_type, dataset_id=dataset_id, held_out=True, num_repeats=1)
        return _describe(row, draw, array("I", range(len(draw))))

    def _open_draws(self) -> list[Draw | None]:
        """A draw for each source; None for one that has no share."""
        there = [self._count_trainable(source) for source in self._sources]
        refuse_without_examples(self._sources, there)
        wants_all = self._list_whole(there)
        return [
            self._open_draw(index, source, wants_all=index in wants_all) if source.share else None
            for index, source in enumerate(self._sources)
        ]

    def _list_whole(self, there: Sequence[int]) -> set[int]:
        """Sources of which every row will be drawn, as far as it can be told before one is."""
        mix = self._mix
        if mix.unit != "examples":
            shared = [index for index, source in enumerate(self._sources) if source.share]
            # Of several, one alone gives all it has, and which one is not known yet.
            return set(shared) if mix.total is None and len(shared) == 1 else set()
        counts = allocate(self._sources, there, total=mix.total, policy=mix.policy, max_repeats=mix.max_repeats)
        return {index for index, count in enumerate(counts) if count >= there[index]}

    def _open_draw(self, index: int, source: MixSource, *, wants_all: bool) -> Draw:
        reference = self._spec.find_dataset(source.dataset_id)
        num_rows, left_out = self._num_rows[source.dataset_id], self._left_out.get(reference.sha256)
        if wants_all and left_out is None:
            store = self._stores.open_whole(reference)
        else:
            store = self._stores.open_drawn(reference, self._name("train", source=index))
        order = Permutation(num_rows, seed=self._seed, purpose=f"select {source.trait_type} {reference.sha256}")
        rows = iter(order) if left_out is None else skip_rows(iter(order), left_out)
        return self._draw(store, reference, rows, self._count_trainable(source), self._mix.unit)

    def _draw(
        self, store: TokenStore, reference: DatasetReference, rows: Iterator[int], num_rows: int, unit: str
    ) -> Draw:
        index = self._stores.index(reference)
        return Draw(store, index, rows, num_rows=num_rows, unit=unit, most_per_row=self._most_per_row)

    def _name(self, purpose: str, **facts: object) -> dict[str, object]:
        """Everything that decides which rows are drawn for a purpose."""
        name = {"draw": _DRAW_VERSION, "for": purpose, "seed": self._seed, **facts}
        if purpose == "train":
            name["mix"] = vars(self._mix)
            name["sources"] = [
                [
                    source.trait_type,
                    str(source.share),
                    self._spec.find_dataset(source.dataset_id).sha256,
                    self._spec.find_dataset(source.dataset_id).format,
                ]
                for source in self._sources
            ]
            name["held_out"] = [[trait.trait_type, str(trait.held_out_fraction)] for trait in self._spec.traits]
        return name

    def _give_examples(self, draws: Sequence[Draw | None]) -> list["array[int]"]:
        """Counts by largest remainder. A row that turns out to be no example makes its source smaller, and all anew."""
        mix = self._mix
        while True:
            there = [0 if draw is None else draw.num_available for draw in draws]
            counts = allocate(self._sources, there, total=mix.total, policy=mix.policy, max_repeats=mix.max_repeats)
            check_size(sum(counts))
            for source, draw, count in zip(self._sources, draws, counts, strict=True):
                if draw is not None:
                    draw.draw_examples(count)
                    self._check_left(source, draw)
            if there == [0 if draw is None else draw.num_available for draw in draws]:
                break
        return [
            array("I") if draw is None else _repeat(draw, *divmod(count, max(len(draw), 1)))
            for draw, count in zip(draws, counts, strict=True)
        ]

    def _give_tokens(self, draws: Sequence[Draw | None]) -> list["array[int]"]:
        """Draws towards each source's part of the total, which falls to what the scarcest allows where it may fall."""
        mix = self._mix
        repeats = mix.max_repeats if mix.policy == "repeat" else 1
        total = None if mix.total is None else Fraction(mix.total)
        shared = [(source, draw) for source, draw in zip(self._sources, draws, strict=True) if draw is not None]
        if total is None or mix.policy == "shrink":
            total = draw_in_lockstep(
                [draw for _, draw in shared], [source.share for source, _ in shared], total=total, repeats=repeats
            )
            for source, draw in shared:
                self._check_left(source, draw)
        else:
            for source, draw in shared:
                self._draw_all_wanted(source, draw, source.share * total, repeats)
        return [
            array("I") if draw is None else _give_amount(draw, source.share * total)
            for source, draw in zip(self._sources, draws, strict=True)
        ]

    def _draw_all_wanted(self, source: MixSource, draw: Draw, wanted: Fraction, repeats: int) -> None:
        """Raises `Refusal` MIX_INFEASIBLE when there is less, even repeated."""
        draw.draw_amount(wanted)
        self._check_left(source, draw)
        if draw.exhausted and draw.amount * repeats < wanted:
            raise self._too_few(source, wanted, draw.amount)

    def _count_trainable(self, source: MixSource) -> int:
        left_out = self._left_out.get(self._spec.find_dataset(source.dataset_id).sha256)
        return self._num_rows[source.dataset_id] - (sum(left_out) if left_out else 0)

    def _check_left(self, source: MixSource, draw: Draw) -> None:
        if source.share and draw.exhausted and not len(draw):
            raise self._nothing_left(self._spec.find_dataset(source.dataset_id), draw)

    def _nothing_left(self, reference: DatasetReference, draw: Draw) -> Refusal:
        """A dataset that is wanted and of which nothing was left says why, rather than only that it is empty."""
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(draw.dropped.items()))
        return refuse_user(
            "NO_EXAMPLES_LEFT",
            f"dataset {reference.dataset_id} has no example left ({dropped or 'it is empty'}); "
            f"max_length is {self._max_length}",
            field="hyperparameters.max_length",
            stage="PLANNING",
            dataset_id=reference.dataset_id,
        )

    def _too_few(self, source: MixSource, wanted: Fraction, there: int) -> Refusal:
        unit = _UNIT_NAMES[self._mix.unit]
        repeats = f", even repeated {self._mix.max_repeats} times" if self._mix.policy == "repeat" else ""
        whole = -int(-wanted // 1)
        return infeasible(source, whole, there, f"has {there:,} {unit}{repeats}, and the mix wants {whole:,} of it")


def _repeat(draw: Draw, times: int, rest: int) -> "array[int]":
    """Every example so often, then the first `rest` once more."""
    positions = array("I", range(len(draw))) * times
    positions.extend(range(rest))
    return positions


def _give_amount(draw: Draw, wanted: Fraction) -> "array[int]":
    """All that was drawn, and where that is too little because there is no more, again from the first."""
    if not draw.exhausted or wanted <= draw.amount:
        return _repeat(draw, 1, 0)
    times = int(wanted / draw.amount)
    return _repeat(draw, times, draw.count_nearest(wanted - times * draw.amount))


def _describe(row: DatasetPlan, draw: Draw, positions: "array[int]") -> ChosenSource:
    counted = replace(
        row,
        num_available=len(positions) if row.held_out else draw.num_available,
        num_examples=len(positions),
        num_tokens=sum(draw.tokens[position] for position in positions),
        num_target_tokens=sum(draw.targets[position] for position in positions),
        num_truncated=sum(draw.cuts[position] for position in positions),
        dropped=dict(draw.dropped),
    )
    return ChosenSource(plan=counted, draw=draw, positions=positions)
