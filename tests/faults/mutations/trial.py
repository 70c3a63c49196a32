"""Runs tests on a copy of the tree, with a mutation or without, and says what became of each.

The copy is one directory that every trial changes back; nothing is compiled into it, so that no trial meets another's
bytecode. Processes that a trial leaves behind are ended by their environment.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_service.shim import process_tree
from tests.faults.mutations.mutation import Mutation

_MARK = "TUNESMITH_MUTATION_TRIAL"
_TEST_LIMIT_SECONDS = 60
_TRIAL_LIMIT_SECONDS = 300.0
_FAILED = re.compile(r"^FAILED (\S+?)(?:\[.*)?(?: - .*)?$", re.MULTILINE)
# What pytest exits with: all passed, some failed. Everything else says nothing about the product.
_ALL_PASSED, _SOME_FAILED = 0, 1
_NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".cache", ".faults", "__pycache__", ".*_cache", "data")


class NotProven(Exception):
    """The trial did not end as it must; the message says how, with the end of what pytest said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How pytest ended, which of the listed tests failed, and the end of its output."""

    status: int | None
    failed: frozenset[str]
    output: str
    seconds: float


def copy_tree(source: Path, target: Path) -> None:
    """The files that git knows or would add; without git all but what is built."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=source,
            capture_output=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        shutil.copytree(source, target, ignore=_NOT_COPIED, symlinks=True)
        return
    for name in filter(None, listed.decode().split("\0")):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)


def mutate(text: str, mutation: Mutation) -> str:
    """The file's text without the thing. Raises NotProven when the snippet is not there exactly once."""
    count = text.count(mutation.snippet)
    if count != 1:
        raise NotProven(f"{mutation.name}: its snippet stands {count} times in {mutation.file}, not once")
    return text.replace(mutation.snippet, mutation.replacement)


@contextmanager
def mutated(tree: Path, mutation: Mutation) -> Iterator[None]:
    """The tree with the mutation, until the block ends."""
    path = tree / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(mutate(text, mutation), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def run_tests(tree: Path, tests: Sequence[str]) -> Outcome:
    """Runs the tests in the tree by this interpreter, and ends whatever they leave running."""
    mark = secrets.token_hex(8)
    environment = {
        **os.environ,
        _MARK: mark,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "clients" / "python")]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:randomly"]
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, f"--timeout={_TEST_LIMIT_SECONDS}", *tests],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=_TRIAL_LIMIT_SECONDS)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = None
    while process_tree.kill_with_environment(_MARK, mark):
        time.sleep(0.05)
    return Outcome(
        status=status,
        failed=frozenset(_FAILED.findall(output)),
        output=output[-4000:],
        seconds=time.monotonic() - started,
    )


def check_green(tree: Path, tests: Sequence[str]) -> Outcome:
    """Raises NotProven unless all pass on the tree as it is."""
    outcome = run_tests(tree, tests)
    if outcome.status != _ALL_PASSED:
        raise NotProven(f"without a mutation the tests end with status {outcome.status}:\n{outcome.output}")
    return outcome


def check_red(tree: Path, mutation: Mutation) -> Outcome:
    """Raises NotProven unless each of the mutation's tests fails: as a test, not as an error of collecting it."""
    with mutated(tree, mutation):
        outcome = run_tests(tree, mutation.tests)
    unmoved = sorted(set(mutation.tests) - outcome.failed)
    if outcome.status != _SOME_FAILED or unmoved:
        raise NotProven(
            f"{mutation.name}: pytest ended with status {outcome.status}; not red: {', '.join(unmoved) or 'none'}\n"
            f"{outcome.output}"
        )
    return outcome
