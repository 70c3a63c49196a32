"""A stand-in for flash-attn 2, which PyPI has as source only: its functions over the same kernels inside torch.

TRL's and Unsloth's packing call flash-attn's functions for sequences of different lengths. torch has FlashAttention-2
built in, so where the package itself is not installed the peers get those kernels under its name. Only what training
calls is offered; it is a benchmark's, never imported by the product.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

VERSION = "2.8.3"

_INIT = '''"""FlashAttention-2 as it is built into torch, under the names of the package. Made by a benchmark."""

import torch

__version__ = "{version}"


def _attend(query, key, value, starts_q, starts_k, longest_q, longest_k, dropout, scale, causal, window, rest):
    unknown = {{name: value for name, value in rest.items() if value not in (None, False, 0.0)}}
    if unknown or tuple(window) != (-1, -1):
        raise NotImplementedError(f"not offered here: {{unknown}}, window {{window}}")
    return torch.ops.aten._flash_attention_forward(
        query, key, value, starts_q, starts_k, int(longest_q), int(longest_k), dropout, causal, False, scale=scale
    )[0]


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), **rest):
    """Batches of rows of one length: [B, S, H, D]."""
    lengths = q.shape[1], k.shape[1]
    return _attend(q, k, v, None, None, *lengths, dropout_p, softmax_scale, causal, window_size, rest)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), **rest
):
    """Sequences end to end: [T, H, D], with where each begins."""
    return _attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        rest,
    )


def flash_attn_with_kvcache(*args, **named):
    """Inference only, which is not measured."""
    raise NotImplementedError("the stand-in trains only")
'''

_INTERFACE = '''"""Where the package has its functions."""

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

flash_attn_gpu = None
'''

_PADDING = '''"""Padded rows to sequences end to end, and back."""

import torch


def index_first_axis(rows, indices):
    """The rows at `indices`."""
    return rows[indices]


def unpad_input(hidden, mask, unused_mask=None):
    """What `mask` keeps of [B, S, ...]; with indices, starts, the longest and the lengths."""
    lengths = mask.sum(dim=1, dtype=torch.int32)
    (indices,) = mask.flatten().nonzero(as_tuple=True)
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    return hidden.flatten(0, 1)[indices], indices, starts, int(lengths.max()), lengths


def pad_input(rows, indices, batch, length):
    """The inverse: zeros where nothing was kept."""
    whole = rows.new_zeros(batch * length, *rows.shape[1:])
    whole[indices] = rows
    return whole.unflatten(0, (batch, length))
'''


def is_wanted() -> bool:
    """Whether the package itself is missing here. flash-attn 4 is another one, which shares no more than the name."""
    found = importlib.util.find_spec("flash_attn")
    return found is None or found.origin is None


def write(directory: Path) -> None:
    """Lay the stand-in out as an installed package below `directory`."""
    package = directory / "flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_INIT.format(version=VERSION), encoding="utf-8")
    (package / "flash_attn_interface.py").write_text(_INTERFACE, encoding="utf-8")
    (package / "bert_padding.py").write_text(_PADDING, encoding="utf-8")
    information = directory / f"flash_attn-{VERSION}.dist-info"
    information.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\nSummary: a benchmark's stand-in\n"
    (information / "METADATA").write_text(metadata, encoding="utf-8")
    (information / "top_level.txt").write_text("flash_attn\n", encoding="utf-8")
    names = [f"flash_attn/{name}" for name in ("__init__.py", "flash_attn_interface.py", "bert_padding.py")]
    (information / "RECORD").write_text("".join(f"{name},,\n" for name in names), encoding="utf-8")
