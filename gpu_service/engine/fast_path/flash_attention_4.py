"""FlashAttention-4 (`flash-attn-4`, a pre-release), where it is installed: kernels that are compiled at first use.

Importing and compiling them takes longer than many a run's first step, so it is done beside the training, and what
comes of it is compared with FlashAttention-2 before anybody may use it. Refuses to be used where that failed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, metadata
from itertools import accumulate
from typing import Any

import torch

from gpu_service.engine.fast_path.attention import Attention, Bounds, DifferentiatedAttention, FlashAttention
from gpu_service.engine.training.flat_attention import FlatLayout

_DISTRIBUTION, _MODULE = "flash-attn-4", "flash_attn.cute"
# What its checks, its compiler and the driver raise.
UNUSABLE = (RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError, AttributeError, KeyError)
# The trial pass' sequences, and how far apart two kernels' 16-bit results may be, as a part of their norm.
_TRIAL_LENGTHS = (128, 33, 95)
_APART = 2e-2


def is_installed() -> bool:
    """Whether the distribution is there; nothing of it is imported."""
    try:
        metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return False
    return True


class FlashAttention4(DifferentiatedAttention):
    """Sequences of any lengths in one launch. Made by `Preparation` alone, which tries it first."""

    lengths_may_vary = True

    def __init__(self, attend: Any) -> None:
        """`attend` is the library's function for sequences of any lengths."""
        self._attend_varlen = attend

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        given = self._attend_varlen(
            query,
            key,
            value,
            cu_seqlens_q=bounds.starts,
            cu_seqlens_k=bounds.starts,
            max_seqlen_q=bounds.longest,
            max_seqlen_k=bounds.longest,
            causal=True,
        )
        output: torch.Tensor = given[0] if isinstance(given, tuple) else given
        return output


class Preparation:
    """Imports, compiles and tries it for heads as those of `query` and `key`, in a thread of its own."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor) -> None:
        executor = ThreadPoolExecutor(1, thread_name_prefix="flash-attention-4")
        sizes = (query.shape[1], key.shape[1], query.shape[2])
        self._future = executor.submit(_prepare, sizes, query.device, query.dtype)
        executor.shutdown(wait=False)

    @property
    def is_over(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        """Until it is over, however it ended."""
        self._future.exception()

    def take(self) -> tuple[Attention | None, str]:
        """What came of it, once it is over: the attention, or why there is none."""
        error = self._future.exception()
        if error is not None:
            return None, f"{type(error).__name__}: {error}"
        return self._future.result(), ""


def _prepare(sizes: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> FlashAttention4:
    """Raises whatever stands in the way."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    attention = FlashAttention4(import_module(_MODULE).flash_attn_varlen_func)
    heads, key_value_heads, width = sizes
    widths = [heads * width, key_value_heads * width, key_value_heads * width]
    tokens = sum(_TRIAL_LENGTHS)
    # Not from the generator that training draws from.
    generator = torch.Generator(device).manual_seed(0)
    # One wide matrix, of which the three are columns, as a block has them.
    wide = torch.randn(tokens, sum(widths), device=device, dtype=dtype, generator=generator)
    gradient = torch.randn(tokens, heads, width, device=device, dtype=dtype, generator=generator)
    query, key, value = (part.unflatten(1, (-1, width)) for part in wide.split(widths, dim=1))
    starts = torch.tensor([0, *accumulate(_TRIAL_LENGTHS)], device=device, dtype=torch.int32)
    bounds = Bounds(starts=starts, longest=max(_TRIAL_LENGTHS), layout=FlatLayout(lengths=_TRIAL_LENGTHS))
    results = []
    for one in (FlashAttention(), attention):
        output, kept = one.forward(query, key, value, bounds)
        results.append((output, *one.backward(gradient, query, key, value, output, kept, bounds)))
    for expected, found in zip(*results, strict=True):
        apart = float((found.float() - expected.float()).norm() / expected.float().norm())
        if not apart <= _APART:
            raise ValueError(f"its results are {apart:.3g} apart from those of FlashAttention-2")
    return attention
