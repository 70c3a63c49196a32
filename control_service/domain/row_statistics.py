"""Counts what registration tells of a dataset's rows: lengths and duplicates, in bounded memory. Keeps no row."""

from __future__ import annotations

import hashlib
from collections import Counter

from control_service.domain.dataset import DatasetStatistics, HistogramBucket

DIGEST_BYTES = 16
_EMPTY = bytes(DIGEST_BYTES)
_FIRST_SLOTS = 1024


class DigestSet:
    """Digests that were seen: one flat table with open addressing, never more than half full."""

    def __init__(self, *, max_digests: int) -> None:
        self._max_digests = max_digests
        self._num_digests = 0
        self._num_slots = _FIRST_SLOTS
        self._table = bytearray(_FIRST_SLOTS * DIGEST_BYTES)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the table."""
        return len(self._table)

    def add(self, digest: bytes) -> bool:
        """True when the digest is new. Once the set is full, new ones are still told from old ones, but not kept."""
        at = self._find(digest)
        if self._table[at : at + DIGEST_BYTES] == digest:
            return False
        if self._num_digests < self._max_digests:
            self._table[at : at + DIGEST_BYTES] = digest
            self._num_digests += 1
            if 2 * self._num_digests > self._num_slots:
                self._grow()
        return True

    def _find(self, digest: bytes) -> int:
        """Where the digest is, or the empty slot where it would be."""
        slot = int.from_bytes(digest[:8], "little") % self._num_slots
        while True:
            at = slot * DIGEST_BYTES
            found = self._table[at : at + DIGEST_BYTES]
            if found in (digest, _EMPTY):
                return at
            slot = (slot + 1) % self._num_slots

    def _grow(self) -> None:
        earlier = self._table
        self._num_slots *= 2
        self._table = bytearray(self._num_slots * DIGEST_BYTES)
        for start in range(0, len(earlier), DIGEST_BYTES):
            digest = bytes(earlier[start : start + DIGEST_BYTES])
            if digest != _EMPTY:
                at = self._find(digest)
                self._table[at : at + DIGEST_BYTES] = digest


class RowCounter:
    """Counts the rows of one dataset."""

    def __init__(self, *, max_compared_rows: int) -> None:
        self._seen = DigestSet(max_digests=max_compared_rows)
        self._buckets: Counter[int] = Counter()
        self._num_duplicates = 0
        self._total_characters = 0

    def add(self, *, canonical: bytes, num_characters: int) -> None:
        """Counts a row by its canonical bytes with sorted keys, and its text."""
        if not self._seen.add(hashlib.blake2b(canonical, digest_size=DIGEST_BYTES).digest()):
            self._num_duplicates += 1
        self._buckets[num_characters.bit_length()] += 1
        self._total_characters += num_characters

    def statistics(self) -> DatasetStatistics:
        """What was counted. The buckets follow each other without a gap, from the first that has a row to the last."""
        present = range(min(self._buckets), max(self._buckets) + 1) if self._buckets else range(0)
        return DatasetStatistics(
            num_duplicates=self._num_duplicates,
            total_characters=self._total_characters,
            # Numbers of n bits begin at 2^(n - 1); no character at all is a bucket of its own.
            characters=tuple(
                HistogramBucket(minimum=1 << (bits - 1) if bits else 0, count=self._buckets[bits]) for bits in present
            ),
        )
