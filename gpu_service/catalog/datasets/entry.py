"""What a dataset format says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DatasetFormatEntry:
    """`builder` is a module of the planner that reads a row; `columns` are the keys that a row must have."""

    id: str
    description: str
    builder: str
    columns: tuple[str, ...]
    # True: a row can only be rendered with a chat template.
    needs_chat_template: bool
    # True: a row is a pair of answers, of which one is preferred.
    is_preference: bool = False
