"""BlobService over a real socket: resume, wrong content, nothing visible before it is whole."""

from __future__ import annotations

import hashlib

import grpc
import pytest

from tests.fakes.gpu_runs import WAIT_SECONDS
from tests.fakes.gpu_server import GpuServer, error_info
from tunesmith.gpu.v1 import blob_service_pb2

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def missing(server: GpuServer, digest: str = DIGEST) -> list[tuple[str, int]]:
    request = blob_service_pb2.FindMissingBlobsRequest(sha256=[digest])
    found = server.blobs.FindMissingBlobs(request, timeout=WAIT_SECONDS).missing
    return [(blob.sha256, blob.stored_bytes) for blob in found]


def test_an_unfinished_blob_is_continued_where_it_stopped(server: GpuServer) -> None:
    with pytest.raises(grpc.RpcError) as short:
        server.write_blob(CONTENT[:3000], sha256=DIGEST, size_bytes=len(CONTENT))
    assert error_info(short.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "CHECKSUM_MISMATCH")
    assert missing(server) == [(DIGEST, 3000)]
    with pytest.raises(grpc.RpcError) as unseen:
        server.read_blob(DIGEST)
    assert error_info(unseen.value)[:2] == (grpc.StatusCode.NOT_FOUND, "BLOB_NOT_FOUND")
    with pytest.raises(grpc.RpcError) as gap:
        server.write_blob(CONTENT, offset=4000)
    code, reason, details = error_info(gap.value)
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "OFFSET_MISMATCH")
    assert details["stored_bytes"] == "3000"
    server.kill()
    server.start()
    assert server.write_blob(CONTENT, offset=3000).stored_bytes == len(CONTENT)
    assert missing(server) == []
    assert server.read_blob(DIGEST) == CONTENT
    assert server.read_blob(DIGEST, offset=10_000) == CONTENT[10_000:]
    # Once more is answered without being written.
    assert server.write_blob(CONTENT).stored_bytes == len(CONTENT)


def test_wrong_content_is_refused_and_forgotten(server: GpuServer) -> None:
    for content, size in ((b"x" * len(CONTENT), None), (CONTENT + b"more", len(CONTENT))):
        with pytest.raises(grpc.RpcError) as wrong:
            server.write_blob(content, sha256=DIGEST, size_bytes=size)
        assert error_info(wrong.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "CHECKSUM_MISMATCH")
    assert server.write_blob(CONTENT).stored_bytes == len(CONTENT)
    assert server.read_blob(DIGEST) == CONTENT


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63])
def test_what_is_no_digest_never_becomes_a_path(server: GpuServer, digest: str) -> None:
    calls = (
        lambda: missing(server, digest),
        lambda: server.read_blob(digest),
        lambda: server.write_blob(b"content", sha256=digest or " "),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert error_info(refused.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


def test_a_chunk_over_the_limit_is_refused(server: GpuServer) -> None:
    size = 1024 * 1024 + 1
    request = blob_service_pb2.WriteBlobRequest(sha256=DIGEST, size_bytes=size, chunk=b"x" * size)
    with pytest.raises(grpc.RpcError) as refused:
        server.blobs.WriteBlob(iter([request]), timeout=WAIT_SECONDS)
    assert error_info(refused.value)[1] == "TOO_LARGE"
