"""The token loop: prompt in pieces, then one token after the other over a key-value cache. Knows nothing of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache

# A longer prompt goes through in pieces of this, so that a stop never waits for the whole of it.
PREFILL_TOKENS = 1024


def generate(
    model: Any,
    prompt: Sequence[int],
    *,
    device: torch.device,
    choose: Callable[[torch.Tensor], int],
    before_each: Callable[[], None],
) -> Iterator[int]:
    """Token ids without end. `choose` is given logits, float [vocabulary]; `before_each` pass may raise to stop.

    The caller sets evaluation mode, number types and gradients; `model` has a `config` and takes a cache.
    """
    cache = DynamicCache(config=model.config)
    for start in range(0, len(prompt), PREFILL_TOKENS):
        before_each()
        logits = _forward(model, prompt[start : start + PREFILL_TOKENS], cache, device)
    while True:
        token = choose(logits)
        yield token
        before_each()
        logits = _forward(model, [token], cache, device)


def _forward(model: Any, token_ids: Sequence[int], cache: DynamicCache, device: torch.device) -> torch.Tensor:
    """Logits behind the last of the tokens, float32 [vocabulary]; the cache grows by the tokens."""
    output = model(
        input_ids=torch.tensor([list(token_ids)], device=device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = output.logits[0, -1].float()
    return logits
