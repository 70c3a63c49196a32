"""The table of mutations is true of today's code, and the proof itself tells red from green. The whole table is proven
by `make mutations`."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.faults.mutations.mutation import Mutation
from tests.faults.mutations.table import MUTATIONS
from tests.faults.mutations.trial import NotProven, check_green, check_red, copy_tree, mutate

ROOT = Path(__file__).parents[2]
# One of each service, of tests that take no time.
PROVEN = ("states-are-not-checked", "an-older-attempt-is-accepted")


@cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_names_are_said_once_and_there_are_enough() -> None:
    assert [name for name, count in Counter(mutation.name for mutation in MUTATIONS).items() if count > 1] == []
    assert len(MUTATIONS) >= 100
    services = Counter(mutation.file.partition("/")[0] for mutation in MUTATIONS)
    assert set(services) == {"clients", "control_service", "gpu_service"}
    assert min(services["control_service"], services["gpu_service"]) >= 40


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_todays_code_and_its_tests_are_there(mutation: Mutation) -> None:
    text = mutate((ROOT / mutation.file).read_text(encoding="utf-8"), mutation)
    # What cannot be imported proves nothing.
    compile(text, mutation.file, "exec")
    assert mutation.tests
    for test in mutation.tests:
        file, _, function = test.partition("::")
        assert function in functions_of(file), test


def test_the_proof_tells_red_from_green(tmp_path: Path) -> None:
    copy_tree(ROOT, tmp_path)
    mutations = [mutation for mutation in MUTATIONS if mutation.name in PROVEN]
    assert len(mutations) == len(PROVEN)
    before = {mutation.file: (tmp_path / mutation.file).read_bytes() for mutation in mutations}
    check_green(tmp_path, [test for mutation in mutations for test in mutation.tests])
    for mutation in mutations:
        assert check_red(tmp_path, mutation).failed == set(mutation.tests)
    # Nothing is taken out here; what cannot be imported is no proof either.
    for replacement in (mutations[0].snippet, "if )"):
        with pytest.raises(NotProven):
            check_red(tmp_path, replace(mutations[0], replacement=replacement))
    assert {file: (tmp_path / file).read_bytes() for file in before} == before
