"""SHA-256 of every piece of weight files whose whole digest was verified once, so that threads can verify them again.

One file of the node's cache for each digest of weights; it says too what the files were then, for whoever need not read
them again (`verification`). It is believed only where it names the same files in the same
sizes; a piece that differs says no more than that somebody must hash the files from front to back. Losing it costs
that time and nothing else. Refuses nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_service.catalog.known_files import FileIdentity
from gpu_service.engine.reading.reader import PIECE_BYTES

_LOG = logging.getLogger(__name__)
_FORMAT = 2
DIRECTORY = "weights"

# By file, the digest of the piece that begins at an offset.
Digests = Mapping[Path, Mapping[int, bytes]]


@dataclass(frozen=True, kw_only=True)
class Record:
    """`identities` has those files that were settled when they were hashed."""

    digests: Digests
    identities: Mapping[Path, FileIdentity]


def find(cache_directory: Path, weights_digest: str, files: Sequence[Path]) -> Record | None:
    """What is known of these files; None when nothing is, or it is damaged or of another format."""
    path = _path(cache_directory, weights_digest)
    try:
        document = unseal(path.read_bytes())
        sizes = {file.name: file.stat().st_size for file in files}
        if document["format"] != _FORMAT or document["piece_bytes"] != PIECE_BYTES or document["sizes"] != sizes:
            return None
        found = {
            file: {int(offset): bytes.fromhex(digest) for offset, digest in document["pieces"][file.name].items()}
            for file in files
        }
        identities = {
            file: FileIdentity.from_json(document["identities"][file.name])
            for file in files
            if file.name in document["identities"]
        }
        os.utime(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("the digests of pieces of weights %s are ignored: %s", weights_digest, error)
        return None
    return Record(digests=found, identities=identities)


def keep(cache_directory: Path, weights_digest: str, digests: Digests, identities: Mapping[Path, FileIdentity]) -> None:
    """For the next time; `digests` are of files whose whole digest was verified. A full disk costs that time alone."""
    document = {
        "format": _FORMAT,
        "piece_bytes": PIECE_BYTES,
        "sizes": {file.name: file.stat().st_size for file in digests},
        "identities": {file.name: identity.to_json() for file, identity in identities.items()},
        "pieces": {
            file.name: {str(offset): digest.hex() for offset, digest in sorted(pieces.items())}
            for file, pieces in digests.items()
        },
    }
    path = _path(cache_directory, weights_digest)
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(seal(document))
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        _LOG.warning("the digests of pieces of weights %s are not kept: %s", weights_digest, error)


def forget(cache_directory: Path, weights_digest: str) -> None:
    """They did not hold."""
    _path(cache_directory, weights_digest).unlink(missing_ok=True)


def seal(document: Mapping[str, Any]) -> bytes:
    """JSON with its own SHA-256 in front."""
    text = json.dumps(document, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def unseal(content: bytes) -> Any:
    """What `seal` was given. Raises ValueError for anything that is not whole."""
    digest, _, text = content.partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("it is damaged")
    return json.loads(text)


def _path(cache_directory: Path, weights_digest: str) -> Path:
    return cache_directory / DIRECTORY / f"{weights_digest}.json"
