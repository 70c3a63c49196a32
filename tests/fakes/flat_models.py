"""Tiny models of every family, and what examples cost under them: in flat passes, and one by one by transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from gpu_service.catalog import families
from gpu_service.engine.training.batches import MicroBatchLimit, collate, split
from gpu_service.engine.training.flat_attention import attending_within_sequences
from gpu_service.engine.training.likelihood import nats_by_sequence
from tests.fakes.planned_rows import PlannedRows

VOCABULARY_SIZE = 512
# Shorter and longer than the window, with two of one token (no target) side by side, as truncation may leave them.
LENGTHS = (5, 40, 1, 1, 17, 64, 2, 9)
_WINDOW = 8
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Every family's own way to a sliding window, beside layers that have none where a family mixes them.
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": _WINDOW},
    "qwen2": {"sliding_window": _WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": _WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "gemma3": {
        "sliding_window": _WINDOW,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"sliding_window": _WINDOW},
}
PLAIN: dict[str, dict[str, Any]] = {family: {} for family in families.REGISTRY} | {
    "mistral": {"sliding_window": None},
    "gemma3": {**WINDOWED["gemma3"], "sliding_window": 512},
}
CASES = {family: (family, extras) for family, extras in PLAIN.items()} | {
    f"{family}-window": (family, extras) for family, extras in WINDOWED.items()
}


def make_model(family: str, extras: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    entry = families.REGISTRY[family]
    config = getattr(transformers, entry.config_class)(**{**_SIZES, **extras})
    torch.manual_seed(0)
    model = getattr(transformers, entry.architecture)(config)
    # Random weights of the usual size attend almost evenly; larger ones make who attends to whom show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.to(dtype).train()


def flat_nats(model: Any, rows: PlannedRows, limit: MicroBatchLimit | None = None) -> torch.Tensor:
    """Nats of every example, in flat passes."""
    with attending_within_sequences(model):
        return torch.cat(
            [
                nats_by_sequence(model, collate(rows.as_data(), part).to(model.device))
                for part in split(rows.as_data(), rows.references, limit or MicroBatchLimit())
            ]
        )


def single_nats(model: Any, rows: PlannedRows) -> torch.Tensor:
    """The same by transformers alone: an example at a time, with nothing said of positions or masks."""
    nats = []
    for reference in rows.references:
        example = rows.example(reference)
        tokens = torch.tensor(example.tokens.tolist(), device=model.device)
        mask = torch.tensor(example.mask.tolist(), dtype=torch.bool, device=model.device)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0].double()
        chosen = logits.log_softmax(dim=-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        nats.append(-chosen[mask[1:]].sum())
    return torch.stack(nats)
