"""Bytes on disk: what is visible is whole, what is deleted is gone, and no path leaves its root."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from control_service.adapters.blobs.directories import parts_of
from control_service.adapters.blobs.disk import BlobDirectory
from control_service.adapters.blobs.output import OutputTree
from control_service.adapters.blobs.store import DiskBlobStore
from control_service.domain.artifact import FileReference
from control_service.domain.errors import Internal, InvalidArgument, NotFound, ResourceExhausted

CONTENT = b"0123456789" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[DiskBlobStore]:
    store = DiskBlobStore(directory=tmp_path / "blobs", output_root=tmp_path / "output")
    await store.open()
    yield store
    await store.close()


async def _chunks(content: bytes, *, size: int = 777, fail: bool = False) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]
    if fail:
        raise ConnectionError("the sender went away")


async def _put(store: DiskBlobStore, content: bytes = CONTENT) -> FileReference:
    staged = await store.stage(_chunks(content), max_bytes=10**6)
    await store.commit(staged)
    return FileReference(path="a/b.bin", sha256=staged.sha256, size_bytes=staged.size_bytes)


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


async def test_bytes_are_visible_only_after_commit(store: DiskBlobStore, tmp_path: Path) -> None:
    staged = await store.stage(_chunks(CONTENT), max_bytes=len(CONTENT))
    assert (staged.sha256, staged.size_bytes) == (SHA256, len(CONTENT))
    assert not await store.has(SHA256)
    with store.open_staged(staged) as reader:
        assert reader.read() == CONTENT
    await store.commit(staged)
    assert await store.has(SHA256)
    assert _files(tmp_path / "blobs") == {f"{SHA256[:2]}/{SHA256}": CONTENT}
    again = await store.stage(_chunks(CONTENT), max_bytes=len(CONTENT))
    await store.commit(again)
    await store.discard(again)
    assert _files(tmp_path / "blobs") == {f"{SHA256[:2]}/{SHA256}": CONTENT}


async def test_reading_starts_at_an_offset(store: DiskBlobStore) -> None:
    await _put(store)
    assert b"".join([chunk async for chunk in store.read(SHA256, offset=9_995)]) == CONTENT[9_995:]
    assert [chunk async for chunk in store.read(SHA256, offset=len(CONTENT))] == []
    with store.open_blob(SHA256) as reader:
        assert reader.read(3) == b"012"


async def test_what_is_not_there_is_not_found(store: DiskBlobStore) -> None:
    with pytest.raises(NotFound):
        [chunk async for chunk in store.read("0" * 64)]
    for name in ("0" * 64, "../../etc/passwd", "A" * 64, ""):
        with pytest.raises(NotFound) as caught:
            store.open_blob(name)
        assert caught.value.reason == "BLOB_NOT_FOUND"


@pytest.mark.parametrize("problem", ["too large", "sender fails"])
async def test_a_failed_staging_leaves_nothing(store: DiskBlobStore, tmp_path: Path, problem: str) -> None:
    expected = ResourceExhausted if problem == "too large" else ConnectionError
    max_bytes = len(CONTENT) - 1 if problem == "too large" else len(CONTENT)
    with pytest.raises(expected):
        await store.stage(_chunks(CONTENT, fail=problem == "sender fails"), max_bytes=max_bytes)
    await store.close()
    assert _files(tmp_path / "blobs") == {}


async def test_what_an_earlier_process_left_is_deleted_at_open(store: DiskBlobStore, tmp_path: Path) -> None:
    await store.stage(_chunks(CONTENT), max_bytes=10**6)
    assert _files(tmp_path / "blobs")
    await store.open()
    assert _files(tmp_path / "blobs") == {}


async def test_deleting_frees_the_bytes_once(store: DiskBlobStore, tmp_path: Path) -> None:
    await _put(store)
    assert await store.delete(SHA256) == len(CONTENT)
    assert await store.delete(SHA256) == 0
    assert _files(tmp_path / "blobs") == {}


async def test_an_output_holds_exactly_its_files_and_shares_their_bytes(store: DiskBlobStore, tmp_path: Path) -> None:
    file = await _put(store)
    await store.materialize(path="./out/job/adapter", files=[file])
    placed = tmp_path / "output" / "out" / "job" / "adapter" / "a" / "b.bin"
    assert placed.read_bytes() == CONTENT
    assert placed.stat().st_ino == (tmp_path / "blobs" / SHA256[:2] / SHA256).stat().st_ino
    other = await _put(store, b"other")
    await store.materialize(path="out/job/adapter", files=[FileReference(**{**vars(other), "path": "new.txt"})])
    assert _files(tmp_path / "output") == {"out/job/adapter/new.txt": b"other"}


async def test_an_output_is_copied_and_verified_where_links_cannot_be(store: DiskBlobStore, tmp_path: Path) -> None:
    file = await _put(store)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    outputs = OutputTree(root=tmp_path / "output", blobs=BlobDirectory(tmp_path / "blobs"), link=refuse)
    outputs.materialize("out", [file])
    placed = tmp_path / "output" / "out" / "a" / "b.bin"
    assert placed.read_bytes() == CONTENT
    assert placed.stat().st_nlink == 1
    blob = tmp_path / "blobs" / SHA256[:2] / SHA256
    blob.chmod(0o644)
    blob.write_bytes(b"x" * len(CONTENT))
    with pytest.raises(Internal):
        outputs.materialize("out", [file])
    assert _files(tmp_path / "output") == {"out/a/b.bin": CONTENT}


async def test_removing_an_output_takes_empty_directories_with_it(store: DiskBlobStore, tmp_path: Path) -> None:
    file = await _put(store)
    await store.materialize(path="out/job/adapter", files=[file])
    await store.materialize(path="out/job/report", files=[file])
    await store.remove_output(path="out/job/adapter")
    assert [path.name for path in (tmp_path / "output" / "out" / "job").iterdir()] == ["report"]
    await store.remove_output(path="out/job/report")
    await store.remove_output(path="out/job/report")
    assert list((tmp_path / "output").iterdir()) == []


@pytest.mark.parametrize("place", ["above", "at"])
async def test_an_output_is_never_written_through_a_link(store: DiskBlobStore, tmp_path: Path, place: str) -> None:
    file = await _put(store)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    root = tmp_path / "output"
    if place == "above":
        (root / "out").symlink_to(outside)
        with pytest.raises(InvalidArgument) as caught:
            await store.materialize(path="out/adapter", files=[file])
        assert caught.value.reason == "PATH_NOT_ALLOWED"
        with pytest.raises(InvalidArgument):
            await store.remove_output(path="out/adapter")
    else:
        (root / "adapter").symlink_to(outside)
        await store.materialize(path="adapter", files=[file])
        assert not (root / "adapter").is_symlink()
    assert _files(outside) == {"kept.txt": b"kept"}


@pytest.mark.parametrize("path", ["", ".", "/", "/etc/x", "..", "a/../b", "a\\b", "a\0b", "a\nb", "x/" * 600])
def test_paths_that_leave_the_root_are_refused(path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parts_of(path)
    assert caught.value.reason == "PATH_NOT_ALLOWED"


@pytest.mark.parametrize(("path", "parts"), [("a", ["a"]), ("./a//b/", ["a", "b"]), ("...", ["..."])])
def test_legal_paths_are_taken_apart(path: str, parts: Sequence[str]) -> None:
    assert list(parts_of(path)) == parts


async def test_a_file_of_an_artifact_cannot_leave_it(store: DiskBlobStore, tmp_path: Path) -> None:
    file = await _put(store)
    for path in ("../x", "/x"):
        with pytest.raises(InvalidArgument):
            await store.materialize(path="out", files=[FileReference(**{**vars(file), "path": path})])
    with pytest.raises(NotFound):
        await store.materialize(path="out", files=[FileReference(path="x", sha256="0" * 64, size_bytes=1)])
    assert not (tmp_path / "output" / "out").exists()
    assert not (tmp_path / "x").exists()
    assert list((tmp_path / "output").iterdir()) == []


async def test_every_blob_is_listed_and_nothing_else(store: DiskBlobStore, tmp_path: Path) -> None:
    one, two = await _put(store), await _put(store, b"two")
    await store.stage(_chunks(b"staged"), max_bytes=100)
    (tmp_path / "blobs" / one.sha256[:2] / "notes.txt").write_text("an operator's")
    assert await store.list_all() == sorted([one.sha256, two.sha256])
