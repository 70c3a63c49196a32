"""What a training method says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """`quantizations` are the legal ones, the default first; `aliases` are accepted on input and mean `id`.

    `low_memory_builder` takes the place of `builder` in little memory; empty where there is no such way.
    """

    id: str
    description: str
    builder: str
    quantizations: tuple[str, ...]
    trains_adapter: bool
    default_learning_rate: float
    aliases: tuple[str, ...] = ()
    low_memory_builder: str = ""
