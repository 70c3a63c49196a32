"""Part files: continued, verified, renamed only when right; names that leave the destination are refused."""

import hashlib
from pathlib import Path

import pytest

from tunesmith.common.v1 import file_pb2
from tunesmith_client import TransferDamaged, TransferProgress
from tunesmith_client._transfer import (
    CHUNK_BYTES,
    PartFile,
    destination_of,
    ignore_progress,
    upload_header,
    upload_parts,
)

CONTENT = b"weights" * 100


def reference(content: bytes = CONTENT, path: str = "adapter.bin") -> file_pb2.FileReference:
    digest = hashlib.sha256(content).hexdigest()
    return file_pb2.FileReference(path=path, sha256=digest, size_bytes=len(content))


def test_an_interrupted_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "adapter.bin"
    first = PartFile(target, reference(), ignore_progress)
    first.open()
    first.write(CONTENT[:100])
    first.close()
    assert not target.exists()
    second = PartFile(target, reference(), ignore_progress)
    second.open()
    assert second.offset == 100
    second.write(CONTENT[100:])
    assert second.finish() == target
    second.close()
    assert target.read_bytes() == CONTENT
    assert second.is_there()
    assert list(target.parent.iterdir()) == [target]


def test_wrong_bytes_are_never_renamed_and_are_forgotten(tmp_path: Path) -> None:
    target = tmp_path / "adapter.bin"
    part = PartFile(target, reference(), ignore_progress)
    part.open()
    part.write(b"x" * len(CONTENT))
    with pytest.raises(TransferDamaged):
        part.finish()
    part.close()
    assert not target.exists()
    again = PartFile(target, reference(), ignore_progress)
    again.open()
    assert again.offset == 0
    again.close()


def test_more_than_was_promised_is_refused(tmp_path: Path) -> None:
    part = PartFile(tmp_path / "a", reference(), ignore_progress)
    part.open()
    with pytest.raises(TransferDamaged):
        part.write(CONTENT + b"!")
    part.close()


def test_another_file_of_the_same_size_is_not_mistaken_for_the_right_one(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"x" * len(CONTENT))
    assert not PartFile(target, reference(), ignore_progress).is_there()


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", "", "a\\..\\b", "a\0b"])
def test_a_name_that_leaves_the_destination_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(TransferDamaged):
        destination_of(tmp_path, reference(path=path))


def test_an_upload_says_what_it_sends_first_and_then_sends_exactly_that(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    content = b"0123456789abcdef" * (CHUNK_BYTES // 16) + b"tail"
    file.write_bytes(content)
    header = upload_header(file, "rows", "text")
    assert (header.size_bytes, header.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    seen: list[TransferProgress] = []
    first, *rest = upload_parts(file, header, seen.append)
    assert first.header == header
    assert b"".join(part.chunk for part in rest) == content
    assert max(len(part.chunk) for part in rest) <= CHUNK_BYTES
    assert [progress.done_bytes for progress in seen] == [CHUNK_BYTES, len(content)]
