"""Keeps the tokenizer that was read last, for the next run on the same files. Reads none, and imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_service.catalog.tokenizer_files import tokenizer_digest


class TokenizerShelf:
    """Room for the tokenizer that was read last: reading one of a large vocabulary takes as long as reading a base."""

    def __init__(self) -> None:
        self._key: tuple[Path, str] | None = None
        self._tokenizer: Any = None
        self._chat_template: Any = None

    def find(self, model_directory: Path) -> Any | None:
        """The tokenizer of a model, as it was read, if that is the one and its files are the same. Raises OSError."""
        if self._key is None or self._key != (model_directory, tokenizer_digest(model_directory)):
            return None
        # Runs put the template of their plan in its place.
        self._tokenizer.chat_template = self._chat_template
        return self._tokenizer

    def put(self, model_directory: Path, tokenizer: Any) -> None:
        """Keep a tokenizer that was just read. Raises OSError."""
        self._key = (model_directory, tokenizer_digest(model_directory))
        self._tokenizer, self._chat_template = tokenizer, tokenizer.chat_template

    def clear(self) -> None:
        """Keep nothing."""
        self._key = self._tokenizer = self._chat_template = None
