"""How much of a model's files has to be hashed so that they are known to be those that a job is for.

Nothing, where they are what they were when their bytes were hashed, by the node for the model's digest or by a load
before this one. Every piece, where the digests of pieces are known. Else all of it, from front to back. Whatever was
hashed is remembered. Hashes nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gpu_service.catalog.known_files import FileIdentity
from gpu_service.catalog.weight_files import CACHE_FILE, remembered_weights_digest
from gpu_service.engine.reading import piece_digests
from gpu_service.engine.reading.piece_digests import Digests

# What the files are verified by. Those that a job is pinned to by no digest are read as they are.
NOTHING, IDENTITY, PIECES, WHOLE = "nothing", "identity", "pieces", "whole"


class Verification:
    """Of one load. Make it before anything of the files is read; raises OSError."""

    def __init__(self, cache_directory: Path | None, files: Sequence[Path], digest: str) -> None:
        """`digest` of the weights, empty where the job is pinned to none: nothing is remembered then."""
        self._cache = cache_directory if digest else None
        self._digest = digest
        self.files = files
        self._identities = {file: FileIdentity.of(file) for file in files}
        self._are_settled = all(identity.is_settled() for identity in self._identities.values())
        self._known: Digests | None = None
        self.by = WHOLE if digest else NOTHING
        if self._cache is None:
            return
        if remembered_weights_digest(self._identities, self._cache / CACHE_FILE) == digest:
            self.by = IDENTITY
        elif (record := piece_digests.find(self._cache, digest, files)) is not None:
            is_unchanged = record.identities == self._identities
            self.by = IDENTITY if is_unchanged else PIECES
            self._known = None if is_unchanged else record.digests

    def digests(self, file: Path) -> Mapping[int, bytes]:
        """Those that pieces of a file have to have, by their offset."""
        return {} if self._known is None else self._known[file]

    def find_changed(self) -> Path | None:
        """A file that is not what it was when this began: what was read of it may be of either."""
        for file, identity in self._identities.items():
            if FileIdentity.of(file) != identity:
                return file
        return None

    def keep(self, hashed: Digests) -> None:
        """All files were read, `find_changed` found none, and they are verified: by these digests, if any is new."""
        if self._cache is None or self.by in (NOTHING, IDENTITY):
            return
        if self.by == WHOLE or self._are_settled:
            identities = self._identities if self._are_settled else {}
            piece_digests.keep(self._cache, self._digest, hashed, identities)

    def forget(self) -> None:
        """They did not hold."""
        if self._cache is not None:
            piece_digests.forget(self._cache, self._digest)
