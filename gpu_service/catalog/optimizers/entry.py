"""What an optimizer entry says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry:
    """`state_bytes_per_parameter` is what it keeps for each trainable parameter, `step_bytes_per_parameter` what one of
    its steps takes for each besides.
    """

    id: str
    description: str
    builder: str
    state_bytes_per_parameter: int
    step_bytes_per_parameter: int = 0
