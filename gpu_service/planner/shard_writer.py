"""Writes the files of a token shard, example by example. Reads, renders and tokenizes nothing.

`domain.planned_data.TokenShard` reads what is written here.
"""

import json
from array import array
from pathlib import Path

from gpu_service.domain.planned_data import (
    FLAGS_FILE,
    MASK_FILE,
    OFFSETS_FILE,
    REJECTED_FILE,
    ROWS_FILE,
    SHARD_FILE,
    TOKENS_FILE,
)
from gpu_service.planner.encoding import EncodedExample


class ShardWriter:
    """Fills an empty directory; nothing is to be read there before `finish`."""

    def __init__(self, directory: Path, *, has_pairs: bool) -> None:
        self._directory = directory
        self._has_pairs = has_pairs
        self._tokens = (directory / TOKENS_FILE).open("wb")
        self._mask = (directory / MASK_FILE).open("wb")
        self._offsets, self._flags = array("Q", [0]), bytearray()
        self._rows, self._rejected = array("I"), array("I")
        self._dropped: dict[str, list[int]] = {}

    def add(self, row: int, example: EncodedExample) -> int | None:
        """Keep the example of this row; gives its index, None when it is one that is left out."""
        if example.dropped_reason:
            self._dropped.setdefault(example.dropped_reason, []).append(row)
            return None
        self._tokens.write(example.tokens.tobytes())
        self._mask.write(example.mask)
        self._offsets.append(self._offsets[-1] + len(example.tokens))
        self._flags.append(int(example.truncated))
        self._rows.append(row)
        if self._has_pairs:
            self._rejected.append(example.rejected_start)
        return len(self._flags) - 1

    def finish(self) -> None:
        """Write what describes the examples, and close."""
        self.close()
        arrays = {OFFSETS_FILE: self._offsets, ROWS_FILE: self._rows, REJECTED_FILE: self._rejected}
        for name, values in arrays.items():
            (self._directory / name).write_bytes(values.tobytes())
        (self._directory / FLAGS_FILE).write_bytes(self._flags)
        facts = {
            "num_examples": len(self._flags),
            "num_tokens": self._offsets[-1],
            "has_pairs": self._has_pairs,
            # Rows that were left out, by reason.
            "dropped": self._dropped,
        }
        (self._directory / SHARD_FILE).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")

    def close(self) -> None:
        """Close the files, finished or not."""
        self._tokens.close()
        self._mask.close()
