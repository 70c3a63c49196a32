"""The largest forward passes of a run that was chosen: what its memory depends on. Reads no token."""

from collections.abc import Sequence

from gpu_service.domain.defaults import ResolvedHyperparameters
from gpu_service.domain.memory_passes import ExampleSize, LargestPasses
from gpu_service.planner.choosing import ChosenSource
from gpu_service.planner.selection import RunSteps, Selection

# Among so many examples the largest passes of a run show; looking at more takes seconds.
_EXAMPLES_LOOKED_AT = 1_000_000


def find_largest_passes(
    sources: Sequence[ChosenSource], selection: Selection, run: RunSteps, resolved: ResolvedHyperparameters
) -> LargestPasses:
    """Of the first million examples, and of all that are held out."""
    passes = LargestPasses(resolved.batch)
    # Both answers of a preference pair begin with the prompt; a half is a guess, and matters in float32 alone.
    sequences = 2 if resolved.objective == "dpo" else 1
    for step in range(run.steps.num_steps):
        if run.steps.count_examples(step) >= _EXAMPLES_LOOKED_AT:
            break
        passes.add_step(
            _size(selection.num_tokens[place], selection.num_target_tokens[place], sequences)
            for place in run.steps.places(step)
        )
    passes.add_evaluation(
        _size(source.draw.tokens[position], source.draw.targets[position], sequences)
        for source in sources
        if source.plan.held_out
        for position in source.positions
    )
    return passes


def _size(tokens: int, targets: int, sequences: int) -> ExampleSize:
    return ExampleSize(tokens, targets, -(-tokens // sequences))
