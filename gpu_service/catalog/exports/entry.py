"""What an export format says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ExportEntry:
    """A further form of what was trained. `builder` is a module of the engine.

    `not_offered` says why this format is known and yet not written; then there is no builder.
    """

    id: str
    description: str
    builder: str = ""
    not_offered: str = ""
