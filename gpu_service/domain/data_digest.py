"""The digest of what is trained on: examples, their order, their steps, and what is held out. The same on any machine.

The planner writes it into the plan; who trained computes it again from what the steps gave. It knows nothing of
memory, of a device, of where tokens are kept, or of rows that no step and no evaluation asks for.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

from gpu_service.domain.order import ORDER_VERSION

_VERSION = 2
ENTRY_BYTES = 20
# Steps beyond so many examples follow from seed, selection and settings, which are in it, by the same functions.
MAXIMUM_LISTED_EXAMPLES = 4_194_304


class HasTokens(Protocol):
    """An example, see `domain.planned_data.Example`."""

    @property
    def tokens(self) -> memoryview: ...
    @property
    def mask(self) -> memoryview: ...
    @property
    def rejected_start(self) -> int: ...


def make_entry(source_index: int, example: HasTokens) -> bytes:
    """20 bytes: the source, and a digest over token ids, mask, and where a rejected answer begins."""
    digest = hashlib.blake2b(digest_size=ENTRY_BYTES - 4)
    digest.update(len(example.tokens).to_bytes(8, "little") + example.rejected_start.to_bytes(8, "little"))
    digest.update(example.tokens)
    digest.update(example.mask)
    return source_index.to_bytes(4, "little") + digest.digest()


class DataDigest:
    """Taken in this order: `sources`, the held-out examples, the selection, the steps, then `finish`."""

    def __init__(self, sources: Sequence[tuple[str, bool]], *, seed: int, batch: str) -> None:
        """`sources` are trait and whether it is held out; `batch` names what makes a step, e.g. `examples 8`."""
        self._digest = hashlib.sha256()
        self._add("data", _VERSION, ORDER_VERSION, seed, batch)
        for trait_type, held_out in sources:
            self._add("source", trait_type, held_out)

    def add_held_out(self, examples: Iterable[bytes | bytearray]) -> None:
        """The entries of all held-out examples."""
        self._add("held out", _hash(examples))

    def add_selection(self, examples: Iterable[bytes | bytearray]) -> None:
        """The entries of an epoch's examples before it is shuffled."""
        self._add("selection", _hash(examples))

    def add_step(self, examples: Iterable[bytes | bytearray]) -> None:
        """The entries of the next step's examples, in their order."""
        self._digest.update(hashlib.blake2b(b"".join(examples)).digest())

    def finish(self, *, num_steps: int, total_examples: int) -> str:
        """Lower-case hex SHA-256."""
        self._add("steps", num_steps, total_examples)
        return self._digest.hexdigest()

    def _add(self, *parts: object) -> None:
        self._digest.update(("\t".join(map(str, parts)) + "\n").encode())


def _hash(entries: Iterable[bytes | bytearray]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(entry)
    return digest.hexdigest()
