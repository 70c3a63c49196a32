"""What a training method says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """`quantizations` are the legal ones, the default first; `aliases` are accepted on input and mean `id`."""

    id: str
    description: str
    builder: str
    quantizations: tuple[str, ...]
    trains_adapter: bool
    default_learning_rate: float
    aliases: tuple[str, ...] = ()
