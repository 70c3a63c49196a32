"""Text and spans to token ids and loss mask. Renders nothing, keeps nothing, reads no tokenizer that is not used."""

from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from gpu_service.planner.rendering import Rendered
from gpu_service.planner.tokenizer_source import TokenizerSource


class TextTokenizer:
    """Made once. `end_token_id` is None for a tokenizer that names no end of sequence; `config` is config.json."""

    def __init__(self, source: TokenizerSource, config: Mapping[str, Any]) -> None:
        self._source = source
        self.end_token_id = _find_end_token(source, config)
        self._begin_tokens: list[int] = []

    @cached_property
    def _tokenizer(self) -> Any:
        """Read when the first text comes."""
        tokenizer = self._source.backend
        # Settings saved in the file would cut or pad in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._begin_tokens = _find_begin_tokens(tokenizer)
        # All else that post-processing does to a text is to leave spaces out of offsets (GPT-2's does), and tokens of
        # nothing but spaces, such as a code's indentation, would lie in no span. Ids are the same without it.
        tokenizer.post_processor = None
        return tokenizer

    def encode(
        self, rendered: Sequence[Rendered], *, loss_on_all: bool, max_length: int
    ) -> "list[tuple[array[int], bytes, bool]]":
        """For each text: token ids, mask (1: carries loss as a target), and whether it was cut at `max_length`.

        A token carries loss when any character of it lies in a target span. The first token never does: nothing comes
        before it to predict it from.
        """
        encodings = self._tokenizer.encode_batch([item.text for item in rendered], add_special_tokens=False)
        results = []
        for item, encoding in zip(rendered, encodings, strict=True):
            tokens = array("i", encoding.ids)
            mask = bytearray(b"\1" * len(tokens)) if loss_on_all else _mask(encoding.offsets, item.targets)
            if item.is_document:
                tokens, mask = self._close_document(tokens, mask, loss_on_all=loss_on_all)
            if mask:
                mask[0] = 0
            cut = len(tokens) > max_length
            results.append((tokens[:max_length], bytes(mask[:max_length]), cut))
        return results

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones as they are written."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def _close_document(
        self, tokens: "array[int]", mask: bytearray, *, loss_on_all: bool
    ) -> "tuple[array[int], bytearray]":
        begin = self._begin_tokens
        tokens = array("i", begin) + tokens
        mask = bytearray(int(loss_on_all) for _ in begin) + mask
        if self.end_token_id is not None:
            tokens.append(self.end_token_id)
            mask.append(1)
        return tokens, mask


def _find_begin_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer's own post-processing puts in front of a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    dressed = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return list(dressed[:start])
    return []


def _find_end_token(source: TokenizerSource, config: Mapping[str, Any]) -> int | None:
    """The tokenizer's `eos_token`, else the first of config.json's `eos_token_id`."""
    text = source.special_tokens.get("eos_token")
    token = source.special_ids.get(text) if text else config.get("eos_token_id")
    if isinstance(token, list):
        token = token[0] if token else None
    return token if isinstance(token, int) and not isinstance(token, bool) else None


def _mask(offsets: Sequence[tuple[int, int]], targets: Sequence[tuple[int, int]]) -> bytearray:
    """1 for each token that overlaps a span; both are in order, so one pass does."""
    mask = bytearray(len(offsets))
    # An empty span overlaps nothing, not even the token that it lies in.
    spans = iter([span for span in targets if span[1] > span[0]])
    span_start, span_end = next(spans, (-1, -1))
    for index, (start, end) in enumerate(offsets):
        while span_end <= start and span_start >= 0:
            span_start, span_end = next(spans, (-1, -1))
        if span_start < 0:
            break
        if start < span_end and end > span_start and end > start:
            mask[index] = 1
    return mask
