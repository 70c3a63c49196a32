"""What a model family says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FamilyEntry:
    """`config_types` are the `model_type`s of config.json that it accepts, its own first.

    `config_class` is the transformers class built for a config.json that names no `model_type`. LoRA covers every
    linear layer but the head unless the project names targets, so a family lists none.
    """

    id: str
    description: str
    builder: str
    config_types: tuple[str, ...]
    config_class: str
    architecture: str
    # Whether its decoder layers are those that `engine.fast_path` knows.
    has_fast_path: bool = False
