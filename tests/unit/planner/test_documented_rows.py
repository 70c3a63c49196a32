"""Rows of docs/training.md come to the texts and loss marks that stand below them."""

import importlib
import json
import re
from pathlib import Path

import pytest

from gpu_service.catalog import datasets as dataset_formats
from gpu_service.catalog import templates
from gpu_service.planner.chat_template import ChatTemplate
from gpu_service.planner.rendering import Rendered, RenderedPair

DOCUMENT = Path(__file__).parents[3] / "docs" / "training.md"
EXAMPLES = re.findall(
    r"<!-- row: ([a-z-]+) ?([a-z-]*) -->\n```text\n(.*?)\n----\n(.*?)\n```",
    DOCUMENT.read_text(encoding="utf-8"),
    re.DOTALL,
)


def mark(rendered: Rendered) -> str:
    text = rendered.text
    for start, end in reversed(rendered.targets):
        text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
    return text


def test_every_marked_row_was_found() -> None:
    assert len(EXAMPLES) == DOCUMENT.read_text(encoding="utf-8").count("<!-- row: ") >= 4


@pytest.mark.parametrize(("format", "template", "row", "shown"), EXAMPLES, ids=lambda value: value[:20].strip("{"))
def test_a_row_comes_to_what_is_shown(format: str, template: str, row: str, shown: str) -> None:
    chat = ChatTemplate(templates.REGISTRY[template].read_text(), {}) if template else None
    render = importlib.import_module(dataset_formats.REGISTRY[format].builder).render
    rendered: Rendered | RenderedPair = render(json.loads(row), chat)
    halves = (rendered.chosen, rendered.rejected) if isinstance(rendered, RenderedPair) else (rendered,)
    assert shown.split("\n----\n") == [mark(half) for half in halves]
