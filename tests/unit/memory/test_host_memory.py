"""What a process may have of its machine, by the machine and by the cgroups that it is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_service import host_memory

_GIB = 1 << 30


@pytest.fixture
def place(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "own").write_text("0::/pod/container\n")
    (tmp_path / "pod" / "container").mkdir(parents=True)
    return {"root": tmp_path, "own": tmp_path / "own"}


def _write(directory: Path, **content: str) -> None:
    for name, text in content.items():
        (directory / name.replace("_of_", ".")).write_text(text)


def test_without_a_limit_it_is_the_machine_s(place: dict[str, Any]) -> None:
    _write(place["root"] / "pod" / "container", memory_of_max="max\n", memory_of_current="5\n")
    assert host_memory.total_bytes(**place) == psutil.virtual_memory().total
    assert 0 < host_memory.available_bytes(**place) <= host_memory.total_bytes(**place)


def test_the_lowest_limit_on_the_way_up_counts(place: dict[str, Any]) -> None:
    container, pod = place["root"] / "pod" / "container", place["root"] / "pod"
    _write(container, memory_of_max=f"{_GIB}\n", memory_of_current=str(_GIB // 2), memory_of_stat="anon 5\n")
    assert host_memory.total_bytes(**place) == _GIB
    assert host_memory.available_bytes(**place) == _GIB // 2
    _write(container, memory_of_stat=f"anon 5\ninactive_file {_GIB // 4}\n")
    assert host_memory.available_bytes(**place) == 3 * _GIB // 4
    _write(pod, memory_of_max=str(_GIB // 2), memory_of_current=str(_GIB))
    assert host_memory.total_bytes(**place) == _GIB // 2
    assert host_memory.available_bytes(**place) == 0


def test_older_cgroups_say_it_in_other_files(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("3:cpu:/a\n2:memory,hugetlb:/a\n")
    directory = tmp_path / "memory" / "a"
    directory.mkdir(parents=True)
    (directory / "memory.limit_in_bytes").write_text(f"{_GIB}\n")
    (directory / "memory.usage_in_bytes").write_text("0\n")
    assert host_memory.total_bytes(root=tmp_path, own=tmp_path / "own") == _GIB


def test_a_machine_without_cgroups(tmp_path: Path) -> None:
    nowhere = {"root": tmp_path, "own": tmp_path / "none"}
    assert host_memory.total_bytes(**nowhere) == psutil.virtual_memory().total
