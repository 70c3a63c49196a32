"""What is laid out for peers: a smaller wheel that is otherwise the same, and the stand-in for flash-attn."""

from __future__ import annotations

import ast
import zipfile
from pathlib import Path

import pytest

from benchmarks.peers import attention_stand_in
from benchmarks.peers.repack import repack


def test_a_repacked_wheel_lacks_the_folder_and_nothing_else(tmp_path: Path) -> None:
    wheel = tmp_path / "thing-1-py3-none-any.whl"
    record = "thing/a.py,,\nweb/page.html,,\nthing-1.dist-info/RECORD,,\n"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("thing/a.py", "A = 1\n")
        made.writestr("web/page.html", "<p>")
        made.writestr("thing-1.dist-info/RECORD", record)
    said = repack(wheel, ["web"], (tmp_path / "small"))
    with zipfile.ZipFile(tmp_path / "small" / wheel.name) as small:
        assert small.namelist() == ["thing/a.py", "thing-1.dist-info/RECORD"]
        assert small.read("thing/a.py") == b"A = 1\n"
        assert b"web/" not in small.read("thing-1.dist-info/RECORD")
    assert "dropped 1 files of web" in said


def test_the_stand_in_is_laid_out_as_a_package(tmp_path: Path) -> None:
    attention_stand_in.write(tmp_path)
    modules = {path.name: ast.parse(path.read_text()) for path in (tmp_path / "flash_attn").iterdir()}
    functions = {node.name for node in modules["__init__.py"].body if isinstance(node, ast.FunctionDef)}
    assert {"flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"} <= functions
    assert set(modules) == {"__init__.py", "flash_attn_interface.py", "bert_padding.py"}
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    assert f"Version: {attention_stand_in.VERSION}" in metadata.read_text()


def test_flash_attn_4_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "four" / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "four"))
    assert attention_stand_in.is_wanted()
    attention_stand_in.write(tmp_path / "two")
    monkeypatch.syspath_prepend(str(tmp_path / "two"))
    assert not attention_stand_in.is_wanted()
