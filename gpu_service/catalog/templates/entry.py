"""What a catalog chat template says of itself, and how its Jinja text is read."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class TemplateEntry:
    """`end_of_turn` closes an assistant's turn; empty means the tokenizer's end-of-sequence token does."""

    id: str
    description: str
    file_name: str
    end_of_turn: str

    def read_text(self) -> str:
        """The Jinja text, which lies beside this file."""
        return (Path(__file__).parent / self.file_name).read_text(encoding="utf-8")
