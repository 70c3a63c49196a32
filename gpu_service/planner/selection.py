"""Which examples an epoch is made of, in what order, and what that comes to in tokens. Reads shards, writes nothing."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gpu_service.domain.checked_plan import DatasetPlan
from gpu_service.domain.order import ORDER_VERSION, Permutation
from gpu_service.domain.planned_data import TokenShard, epoch_order


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """A dataset of a trait with its shard. `sha256` is the dataset's, so that a selection does not hang on an id."""

    plan: DatasetPlan
    sha256: str
    shard: TokenShard


@dataclass(kw_only=True, slots=True)
class RunCount:
    """What one source gives to a whole run."""

    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Selection:
    """An epoch before it is shuffled, in arrays of uint32, because it may be long.

    Example i is `references[2 * i]` (source) and `references[2 * i + 1]` (its example), with its tokens and targets.
    """

    references: "array[int]"
    num_tokens: "array[int]"
    num_target_tokens: "array[int]"
    seed: int

    def __len__(self) -> int:
        return len(self.num_tokens)

    def places(self, total_examples: int) -> Iterator[int]:
        """Where the first `total_examples` of a run stand in the selection, in the order of training."""
        for epoch in range(-(-total_examples // len(self))):
            order = epoch_order(len(self), seed=self.seed, epoch=epoch)
            yield from (order[place] for place in range(min(len(self), total_examples - epoch * len(self))))

    def count_run(self, total_examples: int) -> dict[int, RunCount]:
        """What each source (by index) gives to the first `total_examples` of a run, over as many epochs as it takes.

        Sources that give nothing are not in it.
        """
        epochs, rest = divmod(total_examples, len(self))
        counts: dict[int, RunCount] = {}
        if epochs:
            self._count(range(len(self)), epochs, counts)
        order = epoch_order(len(self), seed=self.seed, epoch=epochs)
        self._count((order[position] for position in range(rest)), 1, counts)
        return counts

    def _count(self, places: Iterable[int], times: int, counts: dict[int, RunCount]) -> None:
        for place in places:
            count = counts.setdefault(self.references[2 * place], RunCount())
            count.examples += times
            count.tokens += times * self.num_tokens[place]
            count.target_tokens += times * self.num_target_tokens[place]


def select(sources: Sequence[PlannedSource], *, seed: int) -> tuple[Selection, list[DatasetPlan], int]:
    """The selection, each source's plan with its tokens counted, and the tokens of the longest example in use.

    A source's examples are taken in the order of its own permutation, from the start again where they repeat.
    """
    selection = Selection(references=array("I"), num_tokens=array("I"), num_target_tokens=array("I"), seed=seed)
    plans = []
    longest = 0
    for source_index, source in enumerate(sources):
        tokens, targets, truncated = array("I"), array("I"), 0
        chosen = _choose(source, seed)
        for example_index in chosen:
            example = source.shard.example(example_index)
            tokens.append(len(example.tokens))
            targets.append(bytes(example.mask).count(1))
            truncated += source.shard.was_truncated(example_index)
        longest = max(longest, max(tokens, default=0))
        counts = {
            "num_tokens": sum(tokens),
            "num_target_tokens": sum(targets),
            "num_truncated": truncated,
            "dropped": source.shard.facts["dropped"],
        }
        plans.append(replace(source.plan, **counts))
        if not source.plan.held_out:
            for example_index in chosen:
                selection.references.extend((source_index, example_index))
            selection.num_tokens.extend(tokens)
            selection.num_target_tokens.extend(targets)
    return selection, plans, longest


def _choose(source: PlannedSource, seed: int) -> "array[int]":
    plan = source.plan
    if plan.held_out:
        return array("I", range(plan.num_available))
    order = Permutation(plan.num_available, seed=seed, purpose=f"select {plan.trait_type} {source.sha256}")
    once = array("I", (order[position] for position in range(min(plan.num_examples, plan.num_available))))
    return array("I", (once[position % len(once)] for position in range(plan.num_examples)))


def compute_data_digest(
    sources: Sequence[PlannedSource], selection: Selection, *, batch_examples: int, total_examples: int
) -> str:
    """Lower-case hex SHA-256 over selection, order, token ids, masks and steps, and over nothing of a machine's.

    Later epochs' orders follow from the seed by the same function as the first one's, which is digested in full.
    """
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        digest.update(("\t".join(map(str, parts)) + "\n").encode())

    add("data", 1, ORDER_VERSION)
    for source in sources:
        add("source", source.plan.trait_type, source.plan.held_out, source.shard.facts["content_digest"])
    add("selection", hashlib.sha256(selection.references.tobytes()).hexdigest())
    order = array("I", epoch_order(len(selection), seed=selection.seed, epoch=0))
    add("order", hashlib.sha256(order.tobytes()).hexdigest())
    add("steps", selection.seed, batch_examples, total_examples)
    return digest.hexdigest()
