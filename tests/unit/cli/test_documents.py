"""What the documents say is there is there: links, commands, exit statuses, the quick start's code."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tunesmith_cli.exit_codes import ExitCode

DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "proto").glob("*.md")]
    if path.name != "CHANGELOG.md"
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    # A pattern in a code span can look like a link.
    text = re.sub(r"`[^`]*`", "", document.read_text(encoding="utf-8"))
    targets = [target for target in LINK.findall(text) if "://" not in target]
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert missing == []


def test_the_exit_statuses_in_operations_are_the_commands() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = text[text.index("## Exit statuses") : text.index("## When something fails")]
    assert [int(row) for row in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)] == [int(code) for code in ExitCode]


def test_the_read_mes_quick_start_uses_names_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    tree = ast.parse(code)
    imports = ast.Module(body=[node for node in tree.body if isinstance(node, ast.ImportFrom)], type_ignores=[])
    names: dict[str, object] = {}
    exec(compile(imports, "README.md", "exec"), names)  # noqa: S102 - only the import lines of our own read-me
    messages = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
    }
    assert messages
    for module, attribute in messages:
        assert hasattr(names[module], attribute), f"{module}.{attribute}"


def test_make_offers_what_the_documents_promise() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    promised = {"help", "setup", "up", "demo", "test", "test-gpu", "lint", "types", "proto", "proto-check"}
    assert promised <= targets
    used = {
        target
        for document in DOCUMENTS
        for target in re.findall(r"`make ([a-z-]+)`", document.read_text(encoding="utf-8"))
    }
    assert used <= targets
