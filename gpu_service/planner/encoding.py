"""Rendered rows to examples: tokens, mask, where a rejected answer begins, and why an example is of no use.

Keeps nothing. Each sequence is cut at `max_length` on its own, so a pair may have twice as many tokens.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gpu_service.planner.rendering import Rendered, RenderedPair
from gpu_service.planner.tokenizer import TextTokenizer

# Nothing to learn is left of it, after it was cut.
NO_TARGET_TOKENS = "no_target_tokens"
# Chosen and rejected are the same, after they were cut.
IDENTICAL_ANSWERS = "identical_answers"

_BATCH_EXAMPLES = 256
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example as a shard keeps it, see `domain.planned_data.Example`; not kept when it has a `dropped_reason`."""

    tokens: "array[int]"
    mask: bytes
    truncated: bool
    rejected_start: int = 0
    dropped_reason: str = ""


class ExampleEncoder:
    """A tokenizer with the settings of one plan."""

    def __init__(self, tokenizer: TextTokenizer, *, loss_on_all: bool, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._loss_on_all = loss_on_all
        self._max_length = max_length

    def encode(self, rendered: Sequence[Rendered | RenderedPair]) -> list[EncodedExample]:
        """One example a row, in their order. A dataset has rows or pairs, and never both."""
        pairs = [item for item in rendered if isinstance(item, RenderedPair)]
        if pairs:
            halves = self._encode_texts([half for pair in pairs for half in (pair.chosen, pair.rejected)], False)
            return [_join(chosen, other) for chosen, other in zip(halves[::2], halves[1::2], strict=True)]
        return self._encode_texts([item for item in rendered if isinstance(item, Rendered)], self._loss_on_all)

    def _encode_texts(self, texts: Sequence[Rendered], loss_on_all: bool) -> list[EncodedExample]:
        encoded = self._tokenizer.encode(texts, loss_on_all=loss_on_all, max_length=self._max_length)
        return [
            EncodedExample(tokens, mask, cut, dropped_reason="" if 1 in mask else NO_TARGET_TOKENS)
            for tokens, mask, cut in encoded
        ]


def _join(chosen: EncodedExample, rejected: EncodedExample) -> EncodedExample:
    same = chosen.tokens == rejected.tokens
    return EncodedExample(
        tokens=chosen.tokens + rejected.tokens,
        mask=chosen.mask + rejected.mask,
        truncated=chosen.truncated or rejected.truncated,
        rejected_start=len(chosen.tokens),
        dropped_reason=chosen.dropped_reason or rejected.dropped_reason or (IDENTICAL_ANSWERS if same else ""),
    )


def split_batches(rendered: Iterable[Rendered | RenderedPair]) -> Iterator[list[Rendered | RenderedPair]]:
    """Groups that are large enough to tokenize in parallel and small enough to hold."""
    batch: list[Rendered | RenderedPair] = []
    characters = 0
    for item in rendered:
        batch.append(item)
        characters += _count_characters(item)
        if len(batch) == _BATCH_EXAMPLES or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _count_characters(item: Rendered | RenderedPair) -> int:
    if isinstance(item, RenderedPair):
        return len(item.chosen.text) + len(item.rejected.text)
    return len(item.text)
