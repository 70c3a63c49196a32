"""What goes first when the cache is over its limit, and what stays whatever the limit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from gpu_service.runs.cache import Protected, delete, make_room
from gpu_service.runs.node_files import NodeFiles

HOUR = 3600.0
NOTHING = Protected(blobs=(), spec_digests=(), planners_rest=True)


class Cache:
    """A node's cache, filled by hand; ages are in hours."""

    def __init__(self, root: Path) -> None:
        self.files = NodeFiles(root / "node", root / "models")
        self.files.prepare()

    def blob(self, letter: str, *, age: float) -> Path:
        return self._file(self.files.blobs / (letter * 2) / (letter * 64), age)

    def shard(self, name: str, *, age: float) -> Path:
        return self._file(self.files.cache / "tokens" / name / "tokens.bin", age).parent

    def plan(self, name: str, spec_digest: str, shard: Path, *, age: float) -> Path:
        directory = self.files.cache / "plans" / name
        self._file(directory / "plan.json", age, json.dumps({"spec_digest": spec_digest}))
        self._file(directory / "data.json", age, json.dumps({"sources": [{"shard": f"../../tokens/{shard.name}"}]}))
        return directory

    def tokenizer(self, *, age: float) -> Path:
        return self._file(self.files.cache / "tokenizers" / "d.json", age)

    @staticmethod
    def _file(path: Path, age: float, content: str = "x" * 8192) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        used = time.time() - age * HOUR
        for item in (path, path.parent):
            os.utime(item, (used, used))
        return path

    def clear(self, max_bytes: int, protected: Protected = NOTHING) -> int:
        return delete(make_room(self.files, max_bytes, protected))


def live(*, blobs: Collection[str] = (), spec_digests: Collection[str] = (), planners_rest: bool = True) -> Protected:
    return Protected(blobs=blobs, spec_digests=spec_digests, planners_rest=planners_rest)


def test_the_longest_unused_goes_first_and_no_more_than_must(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    oldest, older = cache.blob("a", age=9), cache.shard("s", age=8)
    newer, newest = cache.tokenizer(age=7), cache.blob("b", age=6)
    assert cache.clear(1 << 30) == 0
    sizes = sum(path.stat().st_blocks * 512 for path in (newer, newest))
    assert cache.clear(sizes) > 0
    assert [path.exists() for path in (oldest, older, newer, newest)] == [False, False, True, True]
    # The disk has it back: nothing waits in the trash.
    assert list(cache.files.trash.iterdir()) == []
    assert cache.clear(0) > 0
    assert not newer.exists()
    assert not newest.exists()


def test_of_a_full_disk_the_longest_unused_half_goes_whatever_the_limit(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    paths = [cache.blob(name, age=age) for name, age in zip("abcd", (9, 8, 7, 6), strict=True)]
    delete(make_room(cache.files, 1 << 30, NOTHING, kept_share=0.5))
    assert [path.exists() for path in paths] == [False, False, True, True]


def test_what_a_live_run_may_read_stays_and_counts_as_used(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    blob, other_blob = cache.blob("a", age=9), cache.blob("b", age=9)
    shard, other_shard = cache.shard("s", age=9), cache.shard("t", age=9)
    plan, other_plan = cache.plan("p", "live", shard, age=9), cache.plan("q", "over", other_shard, age=9)
    cache.clear(0, live(blobs={"a" * 64}, spec_digests={"live"}))
    assert [path.exists() for path in (blob, shard, plan)] == [True] * 3
    assert [path.exists() for path in (other_blob, other_shard, other_plan)] == [False] * 3
    assert all(path.stat().st_mtime > time.time() - HOUR for path in (blob, shard, plan))
    cache.clear(0)
    assert [path.exists() for path in (shard, plan)] == [False] * 2


def test_a_planner_at_work_loses_neither_tokens_nor_plans_nor_what_it_stages(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    shard, tokenizer, blob = cache.shard("s", age=9), cache.tokenizer(age=9), cache.blob("a", age=9)
    staged = cache.shard(".staging-1", age=9)
    cache.clear(0, live(planners_rest=False))
    assert [path.exists() for path in (shard, tokenizer, staged, blob)] == [True, True, True, False]
    # Without any planner whatever is still staged was left by one that was killed.
    cache.clear(1 << 30)
    assert [path.exists() for path in (shard, tokenizer, staged)] == [True, True, False]


def test_a_blob_that_was_just_pushed_waits_for_its_run(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    blob = cache.blob("a", age=0)
    cache.clear(0)
    assert blob.exists()


@pytest.mark.parametrize(("age", "stays"), [(1, True), (30, False)])
def test_an_unfinished_write_is_given_up_after_a_day(tmp_path: Path, age: float, stays: bool) -> None:
    cache = Cache(tmp_path)
    partial = cache._file(cache.files.blobs / "partial" / ("a" * 64), age)
    cache.clear(1 << 30)
    assert partial.exists() == stays


def test_a_damaged_plan_is_nobodys(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    plan = cache.plan("p", "live", cache.shard("s", age=9), age=9)
    (plan / "plan.json").write_text("{")
    cache.clear(0, live(spec_digests={"live"}))
    assert not plan.exists()


def test_what_engines_keep_of_weights_ages_like_the_rest_planners_or_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    root = cache.files.cache
    old_copy = cache._file(root / "prequantized" / "old" / "data", age=9).parent
    new_copy = cache._file(root / "prequantized" / "new" / "data", age=0.01).parent
    digests = cache._file(root / "weights" / "d.json", age=8)
    being_written = cache._file(root / "prequantized" / ".staging-now" / "data", age=0.5).parent
    abandoned = cache._file(root / "prequantized" / ".staging-then" / "data", age=2).parent
    assert cache.clear(0, live(planners_rest=False)) > 0
    assert [path.exists() for path in (old_copy, new_copy, digests)] == [False, True, False]
    assert [path.exists() for path in (being_written, abandoned)] == [True, False]
