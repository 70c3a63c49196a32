"""Attention of a flat batch: one row of tokens that holds several sequences, each of which sees only itself.

Registered with transformers under a name of its own, which a model bears only inside `attending_within_sequences`. Each
sequence goes through torch's fused attention by itself, causal, so that no mask of tokens by tokens is ever made and
memory grows with the number of tokens, not with its square. Refuses to run without the layout of the batch, and with
any mask from elsewhere: a model that drops the layout on its way fails instead of attending across sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

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
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """`query` [1, heads, tokens, width], `key` and `value` likewise; gives [1, tokens, heads, width]."""
    del unused
    if attention_mask is not None:
        raise ValueError("a flat batch has no attention mask: its layout says what sees what")
    if softcap is not None or not getattr(module, "is_causal", True):
        raise ValueError(f"{type(module).__name__} attends in a way that flat batches do not offer")
    output = attend_flat(
        query, key, value, flat_layout, scaling=scaling, dropout=dropout, sliding_window=sliding_window
    )
    return output.transpose(1, 2), None


def attend_flat(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: FlatLayout,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal attention within each sequence. `query` [1, heads, tokens, width], the others likewise; shaped as it."""
    lengths = list(layout.lengths)
    parts = []
    for one_query, one_key, one_value in zip(
        query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True
    ):
        length = one_query.shape[2]
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = layout.window_mask(length, sliding_window, query.device)
        groups = query.shape[1] // key.shape[1]
        shares_heads = mask is None and _kernel_shares_heads(query)
        if groups > 1 and not shares_heads:
            one_key, one_value = (part.repeat_interleave(groups, dim=1) for part in (one_key, one_value))
        parts.append(
            functional.scaled_dot_product_attention(
                one_query,
                one_key,
                one_value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=shares_heads and groups > 1,
            )
        )
    return torch.cat(parts, dim=2)


def _kernel_shares_heads(query: torch.Tensor) -> bool:
    """Whether an unmasked kernel whose memory grows with the length alone takes keys that several heads share."""
    if query.device.type != "cuda":
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return dtype in (torch.bfloat16, torch.float16)


@contextmanager
def attending_within_sequences(model: Any) -> Iterator[None]:
    """Inside, `model` takes flat batches and nothing else; afterwards it attends as before. May be entered again.

    A model of the fast path never attends otherwise.
    """
    if getattr(model, "attends_within_sequences", False):
        yield
        return
    # Not imported where the fast path trains: it takes seconds.
    from transformers import AttentionInterface

    AttentionInterface.register(_IMPLEMENTATION, _attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
