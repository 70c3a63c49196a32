"""What the documents say is there is there: links, commands, exit statuses, settings, the quick start's code."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

from control_service import config as control_config
from gpu_service import config as gpu_config
from gpu_service.domain.mix import allocate, compute_sources
from gpu_service.domain.spec import Trait, TraitDataset
from tests.conftest import ROOT
from tunesmith.common.v1 import constraints_pb2, training_spec_pb2
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


def test_the_read_mes_quick_start_is_the_example_that_a_test_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    example = (ROOT / "clients" / "python" / "examples" / "quickstart.py").read_text(encoding="utf-8")
    assert code == example[example.index("import sys") :]


def test_every_anchor_is_a_heading() -> None:
    wrong = []
    for document in DOCUMENTS:
        text = re.sub(r"`[^`]*`", "", document.read_text(encoding="utf-8"))
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", text):
            if "://" not in target and anchor not in anchors(document.parent / target if target else document):
                wrong.append((document.name, target, anchor))
    assert wrong == []


def anchors(document: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_settings_in_operations_are_the_services() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for service, settings in (("control", control_config.Settings), ("gpu", gpu_config.Settings)):
        table = re.search(rf"<!-- generated: {service} settings -->\n(.*?)<!-- end -->", text, re.DOTALL)
        assert table is not None
        rows = dict(re.findall(r"^\| `--([a-z-]+)` \| `?([^|`]*)`? \|", table[1], re.MULTILINE))
        assert list(rows) == [name.replace("_", "-") for name in settings.model_fields]
        for name, field in settings.model_fields.items():
            if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
                assert float(rows[name.replace("_", "-")]) == field.default, name


def test_the_hyper_parameters_in_training_have_the_contracts_defaults() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z0-9_.]+)` \| ([^|]*) \|", text, re.MULTILINE))
    declared = dict(defaults(training_spec_pb2.Hyperparameters.DESCRIPTOR, ""))
    declared |= dict(defaults(training_spec_pb2.Mix.DESCRIPTOR, "mix."))
    assert set(declared) <= set(rows)
    for name, default in declared.items():
        assert rows[name] == default or not default, name


def defaults(message: Descriptor, prefix: str) -> Iterator[tuple[str, str]]:
    for field in message.fields:
        if field.message_type is not None:
            yield from defaults(field.message_type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.GetOptions().Extensions[constraints_pb2.constraint].default


def test_the_shares_of_the_example_in_training_come_out() -> None:
    first = Trait(trait_type="a", weight=3, datasets=(TraitDataset(dataset_id=1, percentage=100),))
    halves = tuple(TraitDataset(dataset_id=number, percentage=50) for number in (2, 3))
    sources = compute_sources([first, Trait(trait_type="b", weight=1, datasets=halves)])
    counts = allocate(sources, [300, 100, 40], total=None, policy="shrink", max_repeats=1)
    said = f"{sum(counts)} examples: {' + '.join(map(str, counts))}"
    assert said in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


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
