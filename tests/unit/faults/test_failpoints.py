"""Both tables of failpoints are what the code has, and a failpoint does what is armed, once."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from control_service.domain import failpoints as control_failpoints
from gpu_service.journal import failpoints as gpu_failpoints

ROOT = Path(__file__).resolve().parents[3]
TABLES = {"control_service": control_failpoints.DECLARED, "gpu_service": gpu_failpoints.DECLARED}
MODULES = {"control_service": "control_service.domain.failpoints", "gpu_service": "gpu_service.journal.failpoints"}


def names_called(package: str) -> Iterator[str]:
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "failpoint":
                (argument,) = node.args
                assert isinstance(argument, ast.Constant), f"{path}:{node.lineno} has no literal name"
                yield str(argument.value)


@pytest.mark.parametrize("package", TABLES)
def test_every_declared_failpoint_is_one_place_in_the_code(package: str) -> None:
    assert sorted(names_called(package)) == sorted(TABLES[package])


def test_both_services_can_share_a_directory_of_armed_failpoints() -> None:
    assert not set(control_failpoints.DECLARED) & set(gpu_failpoints.DECLARED)


@pytest.mark.parametrize("package", TABLES)
def test_every_failpoint_says_between_what_it_lies(package: str) -> None:
    for name, between in TABLES[package].items():
        part, _, place = name.partition(".")
        assert part, name
        assert place, name
        assert len(between) > 10, name


def pass_by(package: str, directory: Path | None, name: str, times: int = 1) -> subprocess.CompletedProcess[str]:
    """A process of its own that comes by the failpoint."""
    code = (
        f"from {MODULES[package]} import failpoint\n"
        f"for number in range(1, {times} + 1):\n"
        "    try:\n"
        f"        failpoint({name!r})\n"
        "    except OSError as error:\n"
        "        print('errno', error.errno)\n"
        "    print('passed', number, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'clients' / 'python'}"}
    environment.pop("TUNESMITH_FAILPOINTS", None)
    if directory is not None:
        environment["TUNESMITH_FAILPOINTS"] = str(directory)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("package", TABLES)
def test_a_failpoint_does_what_is_armed_once_and_nothing_when_off(package: str, tmp_path: Path) -> None:
    name = next(iter(TABLES[package]))
    armed = tmp_path / "armed" / name
    for directory in ("armed", "taken"):
        (tmp_path / directory).mkdir()
    armed.write_text(json.dumps({"action": "kill", "after": 2}))
    assert pass_by(package, None, name, times=3).returncode == 0
    killed = pass_by(package, tmp_path, name, times=3)
    assert (killed.returncode, killed.stdout) == (-signal.SIGKILL, "passed 1\n")
    assert not armed.exists()
    (taken,) = (tmp_path / "taken").iterdir()
    assert taken.name.startswith(f"{name}.")
    assert pass_by(package, tmp_path, name, times=3).returncode == 0
    armed.write_text(json.dumps({"action": "raise", "errno": 28}))
    assert pass_by(package, tmp_path, name, times=2).stdout == "errno 28\npassed 1\npassed 2\n"
    armed.write_text(json.dumps({"action": "exit", "status": 7}))
    assert pass_by(package, tmp_path, name).returncode == 7
    refused = pass_by(package, tmp_path, "no.such-place")
    assert refused.returncode != 0
    assert "KeyError" in refused.stderr
