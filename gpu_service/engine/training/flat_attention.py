"""Attention of a flat batch: one row of tokens that holds several sequences, each of which sees only itself.

Registered with transformers under a name of its own, which a model bears only inside `attending_within_sequences`. Each
sequence goes through transformers' own `sdpa` by itself, causal, so that no mask of tokens by tokens is ever made and
memory grows with the number of tokens, not with its square. Refuses to run without the layout of the batch, and with
any mask from elsewhere: a model that drops the layout on its way fails instead of attending across sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# transformers makes no mask for an implementation that has no mask function of its name, and this one has none.
_IMPLEMENTATION = "tunesmith-flat"


@dataclass(frozen=True, kw_only=True)
class FlatLayout:
    """Where the sequences of a flat batch lie: `lengths` in tokens, in order. Travels to the layers as a keyword."""

    lengths: tuple[int, ...]
    # Masks of the sequences that are longer than a sliding window, shared by all layers of a pass.
    _windows: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)

    def window_mask(self, length: int, window: int, device: torch.device) -> torch.Tensor:
        """Which of `length` tokens see which: themselves and the `window` - 1 before. bool [length, length]."""
        found = self._windows.get((length, window))
        if found is None:
            positions = torch.arange(length, device=device)
            distance = positions[:, None] - positions[None, :]
            found = self._windows[length, window] = (distance >= 0) & (distance < window)
        return found


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    flat_layout: FlatLayout,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`query` [1, heads, tokens, width], `key` and `value` likewise; gives [1, tokens, heads, width]."""
    if attention_mask is not None:
        raise ValueError("a flat batch has no attention mask: its layout says what sees what")
    lengths = list(flat_layout.lengths)
    parts = []
    for one_query, one_key, one_value in zip(
        query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True
    ):
        length = one_query.shape[2]
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = flat_layout.window_mask(length, sliding_window, query.device)[None, None]
        part, _ = sdpa_attention_forward(module, one_query, one_key, one_value, mask, **options)
        parts.append(part)
    return torch.cat(parts, dim=1), None


AttentionInterface.register(_IMPLEMENTATION, _attend)


@contextmanager
def attending_within_sequences(model: Any) -> Iterator[None]:
    """Inside, `model` takes flat batches and nothing else; afterwards it attends as before. May be entered again."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
