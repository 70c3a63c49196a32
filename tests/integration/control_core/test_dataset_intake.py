"""Taking a dataset in: a call that is cancelled or fails at any point leaves neither bytes nor record."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from control_service.adapters.files.reader import DatasetFileReader
from control_service.app import datasets
from control_service.app.dataset_intake import ReadTurns
from control_service.app.ports import DatasetFiles
from control_service.domain.dataset_files import CSV, OpenedFile, SourceRow
from control_service.domain.errors import ResourceExhausted
from tests.fakes.control_blobs import MemoryBlobStore
from tests.fakes.control_core import LIMITS, Core, until

from .conftest import OpenCore

DATA = b"text\na\n"


class EndlessFile:
    """Implements `DatasetFiles`: rows without end, the second and later only after `go_on`."""

    def __init__(self) -> None:
        self.reading = threading.Event()
        self.go_on = threading.Event()
        self.is_closed = threading.Event()

    @contextmanager
    def open(self, stream: BinaryIO, *, size_bytes: int, unwanted: threading.Event) -> Iterator[OpenedFile]:
        try:
            yield OpenedFile(file_format=CSV, compression="", columns=("text",), rows=self._rows())
        finally:
            self.is_closed.set()

    def _rows(self) -> Iterator[SourceRow]:
        number = 0
        while True:
            number += 1
            yield SourceRow(number=number, line=number + 1, content={"text": str(number)})
            self.reading.set()
            assert self.go_on.wait(30)


async def _chunks() -> AsyncIterator[bytes]:
    yield DATA


async def _upload(core: Core, files: DatasetFiles) -> None:
    reference = MemoryBlobStore().add(DATA)
    header = datasets.UploadHeader(name="set", sha256=reference.sha256, size_bytes=len(DATA))
    await datasets.upload_dataset(
        header,
        _chunks(),
        store=core.store,
        blobs=core.blobs,
        files=files,
        clock=core.clock,
        limits=LIMITS,
        turns=core.turns,
    )


async def test_a_cancelled_upload_stops_the_thread_that_reads_it(open_core: OpenCore) -> None:
    core = await open_core()
    files = EndlessFile()
    uploading = asyncio.create_task(_upload(core, files))
    assert await asyncio.to_thread(files.reading.wait, 30)
    uploading.cancel()
    files.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await uploading
    assert files.is_closed.is_set()
    assert (core.blobs.staged, core.blobs.blobs) == ({}, {})
    assert await datasets.list_datasets(store=core.store) == []


async def test_no_more_files_are_read_at_once_than_may_be_and_the_next_waits(open_core: OpenCore) -> None:
    core = await open_core()
    core.turns = ReadTurns(max_reads=2)
    files = [EndlessFile() for _ in range(4)]
    uploading = []
    # One after the other: bytes are received in threads, and whoever is received first asks first.
    for file in files[:2]:
        uploading.append(asyncio.create_task(_upload(core, file)))
        assert await asyncio.to_thread(file.reading.wait, 30)
    uploading += [asyncio.create_task(_upload(core, file)) for file in files[2:]]
    await until(lambda: len(core.blobs.staged) >= 4)

    # One that waits goes: its bytes go with it, and nobody gets a place for it.
    uploading[2].cancel()
    with pytest.raises(asyncio.CancelledError):
        await uploading[2]
    await asyncio.sleep(0)
    assert [file.reading.is_set() for file in files] == [True, True, False, False]

    # One that reads goes: its place is free when its thread is over, not when its caller is.
    uploading[0].cancel()
    await asyncio.sleep(0)
    uploading[0].cancel()
    await asyncio.sleep(0)
    assert not files[3].reading.is_set()
    files[0].go_on.set()
    assert await asyncio.to_thread(files[3].reading.wait, 30)
    assert files[0].is_closed.is_set()

    for task, file in zip(uploading, files, strict=True):
        task.cancel()
        file.go_on.set()
    await asyncio.gather(*uploading, return_exceptions=True)
    await until(lambda: core.blobs.staged == {})
    assert (await core.upload("set", DATA)).num_examples == 1


async def test_one_that_waits_past_its_deadline_takes_no_place(open_core: OpenCore) -> None:
    core = await open_core()
    core.turns = ReadTurns(max_reads=1)
    await core.turns.take()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await core.upload("late", DATA)
    assert core.blobs.staged == {}
    core.turns.give_back()
    assert (await core.upload("set", DATA)).num_examples == 1
    assert (await core.upload("other", DATA + b"b\n")).num_examples == 2


class BlankLines(io.RawIOBase):
    """A file without a row, of which no more than the beginning can be read before `go_on`; counts its pieces."""

    def __init__(self) -> None:
        self.reading = threading.Event()
        self.go_on = threading.Event()
        self.num_pieces = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return offset

    def readinto(self, buffer: Any, /) -> int:
        self.num_pieces += 1
        if self.num_pieces > 5:
            self.reading.set()
            assert self.go_on.wait(30)
        if self.num_pieces > 100:
            return 0
        buffer[:] = b"\n" * len(buffer)
        return len(buffer)


async def test_a_cancelled_upload_stops_the_thread_also_where_no_row_comes(
    open_core: OpenCore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    core = await open_core()
    blank = BlankLines()
    monkeypatch.setattr(core.blobs, "open_staged", lambda _: io.BufferedReader(blank, 1 << 16))
    files = DatasetFileReader(limits=LIMITS.files, spool_directory=tmp_path)
    uploading = asyncio.create_task(_upload(core, files))
    assert await asyncio.to_thread(blank.reading.wait, 30)
    uploading.cancel()
    await asyncio.sleep(0)
    # Impatience changes nothing.
    uploading.cancel()
    await asyncio.sleep(0)
    blank.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await uploading
    await until(lambda: blank.closed)
    assert core.blobs.staged == {}
    assert blank.num_pieces < 20


async def test_a_full_disk_between_bytes_and_record_leaves_neither(
    open_core: OpenCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = await open_core()

    async def refuse(work: object) -> None:
        raise ResourceExhausted("DISK_FULL", "no space is left")

    with monkeypatch.context() as patched:
        patched.setattr(core.store, "transact", refuse)
        with pytest.raises(ResourceExhausted):
            await core.upload("set", DATA)
    assert (core.blobs.staged, core.blobs.blobs) == ({}, {})
    assert (await core.upload("set", DATA)).num_examples == 1


async def test_a_call_that_is_cancelled_while_its_record_is_written_has_both_or_neither(
    open_core: OpenCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = await open_core()
    committing, go_on = asyncio.Event(), asyncio.Event()
    commit = core.blobs.commit

    async def slowly(staged: object) -> None:
        committing.set()
        await go_on.wait()
        await commit(staged)  # type: ignore[arg-type]

    monkeypatch.setattr(core.blobs, "commit", slowly)
    uploading = asyncio.create_task(core.upload("set", DATA))
    await committing.wait()
    uploading.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await uploading
    (dataset,) = await datasets.list_datasets(store=core.store)
    assert set(core.blobs.blobs) == {dataset.sha256}
    assert core.blobs.staged == {}
