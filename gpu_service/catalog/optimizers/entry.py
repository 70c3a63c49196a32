"""What an optimizer entry says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry:
    """`state_bytes_per_parameter` is what it keeps for each trainable parameter, blocks' scales counted in.

    `devices` are the types of device on which its resume test passes; on any other it is not offered.
    """

    id: str
    description: str
    builder: str
    state_bytes_per_parameter: float
    devices: tuple[str, ...]
    # Distributions that must be installed.
    requires: tuple[str, ...] = ()
