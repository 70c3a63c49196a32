"""The largest forward passes of a run that was chosen: what its memory depends on. Reads no token."""

from gpu_service.domain.defaults import ResolvedHyperparameters
from gpu_service.domain.memory_passes import ExampleSize, LargestPasses
from gpu_service.planner.selection import RunSteps, Selection

# Among so many examples the largest passes of a run show; looking at more takes seconds.
_EXAMPLES_LOOKED_AT = 1_000_000


def find_largest_passes(
    selection: Selection, run: RunSteps, resolved: ResolvedHyperparameters, *, longest_held_out: int
) -> LargestPasses:
    """Of the first million examples. `longest_held_out` are the tokens of the longest example that is evaluated."""
    passes = LargestPasses(resolved.batch)
    # Both answers of a preference pair begin with the prompt; a half is a guess, and matters in float32 alone.
    sequences = 2 if resolved.objective == "dpo" else 1
    for step in range(run.steps.num_steps):
        if run.steps.count_examples(step) >= _EXAMPLES_LOOKED_AT:
            break
        passes.add_step(
            ExampleSize(
                selection.num_tokens[place],
                selection.num_target_tokens[place],
                -(-selection.num_tokens[place] // sequences),
            )
            for place in run.steps.places(step)
        )
    passes.add_evaluation(longest_held_out)
    return passes
