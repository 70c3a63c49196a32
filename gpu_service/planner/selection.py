"""Which examples an epoch is made of, in what order, and what that comes to in tokens. Reads shards, writes nothing."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpu_service.domain.checked_plan import DatasetPlan
from gpu_service.domain.order import ORDER_VERSION, Permutation
from gpu_service.domain.planned_data import TokenShard, epoch_order, pack_references


@dataclass(frozen=True, kw_only=True)
class PlannedSource:
    """A dataset of a trait with its shard. `sha256` is the dataset's, so that a selection does not hang on an id."""

    plan: DatasetPlan
    sha256: str
    shard: TokenShard


@dataclass(frozen=True, kw_only=True)
class Selection:
    """An epoch before it is shuffled: `references[i]` with its number of tokens and of target tokens."""

    references: Sequence[tuple[int, int]]
    num_tokens: Sequence[int]
    num_target_tokens: Sequence[int]
    seed: int

    def count_run(self, total_examples: int) -> tuple[int, int]:
        """Tokens and target tokens of the first `total_examples` of the run, over as many epochs as that takes."""
        epochs, rest = divmod(total_examples, len(self.references))
        order = epoch_order(len(self.references), seed=self.seed, epoch=epochs)
        last = [order[place] for place in range(rest)]
        return (
            epochs * sum(self.num_tokens) + sum(self.num_tokens[place] for place in last),
            epochs * sum(self.num_target_tokens) + sum(self.num_target_tokens[place] for place in last),
        )


def select(sources: Sequence[PlannedSource], *, seed: int) -> tuple[Selection, list[DatasetPlan], int]:
    """The selection, each source's plan with its tokens counted, and the tokens of the longest example in use.

    A source's examples are taken in the order of its own permutation, from the start again where they repeat.
    """
    references: list[tuple[int, int]] = []
    num_tokens: list[int] = []
    num_target_tokens: list[int] = []
    plans = []
    longest = 0
    for source_index, source in enumerate(sources):
        plan = source.plan
        if plan.held_out:
            chosen: list[int] = list(range(plan.num_available))
        else:
            order = Permutation(plan.num_available, seed=seed, purpose=f"select {plan.trait_type} {source.sha256}")
            once = [order[position] for position in range(min(plan.num_examples, plan.num_available))]
            chosen = [once[position % len(once)] for position in range(plan.num_examples)]
        lengths, targets = [], []
        truncated = 0
        for example_index in chosen:
            example = source.shard.example(example_index)
            lengths.append(len(example.tokens))
            targets.append(bytes(example.mask).count(1))
            truncated += source.shard.was_truncated(example_index)
        longest = max(longest, *lengths, 0)
        plans.append(
            replace(
                plan,
                num_tokens=sum(lengths),
                num_target_tokens=sum(targets),
                num_truncated=truncated,
                dropped=dict(source.shard.facts.get("dropped", {})),
            )
        )
        if not plan.held_out:
            references += [(source_index, example_index) for example_index in chosen]
            num_tokens += lengths
            num_target_tokens += targets
    selection = Selection(references=references, num_tokens=num_tokens, num_target_tokens=num_target_tokens, seed=seed)
    return selection, plans, longest


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
    add("selection", hashlib.sha256(pack_references(selection.references)).hexdigest())
    order = epoch_order(len(selection.references), seed=selection.seed, epoch=0)
    add("order", hashlib.sha256(pack_references([(place, 0) for place in order])).hexdigest())
    add("steps", selection.seed, batch_examples, total_examples)
    return digest.hexdigest()
