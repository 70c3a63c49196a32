"""A row rendered by the builder of its format, with dataset and line in every refusal. Knows no format's rules."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from gpu_service.catalog import datasets as dataset_formats
from gpu_service.domain.errors import Refusal
from gpu_service.domain.spec import DatasetReference
from gpu_service.planner.rendering import ChatRenderer, Rendered, RenderedPair
from gpu_service.planner.rows import RowError, malformed


class RowRenderer:
    """The rows of one dataset. Its format must be in the catalog."""

    def __init__(self, reference: DatasetReference, chat: ChatRenderer | None) -> None:
        self._reference = reference
        self._chat = chat
        builder: Any = importlib.import_module(dataset_formats.REGISTRY[reference.format].builder)
        self._render = builder.render

    def render(self, line: int | Callable[[], int], row: Mapping[str, Any]) -> Rendered | RenderedPair:
        """`line` is the row's, or what finds it, which is called for a refusal alone.

        Raises `Refusal`: DATASET_MALFORMED, or what the chat template is refused with, naming dataset and line.
        """
        try:
            rendered: Rendered | RenderedPair = self._render(row, self._chat)
        except RowError as error:
            raise malformed(self._reference, _find(line), str(error)) from error
        except Refusal as refusal:
            number = _find(line)
            refusal.details.update(dataset_id=str(self._reference.dataset_id), line=str(number))
            refusal.message = f"dataset {self._reference.dataset_id}, line {number}: {refusal.message}"
            raise
        return rendered


def _find(line: int | Callable[[], int]) -> int:
    return line() if callable(line) else line
