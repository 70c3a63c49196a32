"""A Llama-like decoder as modules that hold tensors under transformers' names, in its order; none of them computes.

`LeanCausal` is made without memory (`torch.device("meta")`) and gets its tensors from whoever reads them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from gpu_service.engine.lean.config import LeanConfig


def linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """A layer whose weights nobody drew: torch's own draws them even where there is no memory, which takes its time."""
    return linear_of(torch.empty(outputs, inputs), torch.empty(outputs) if bias else None)


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A layer with these weights, [outputs, inputs] and [outputs]."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return layer


class _Weight(nn.Module):
    """A norm's [size], or an embedding's [rows, size]. torch's own draws numbers, and imports its compiler for it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class _Attention(nn.Module):
    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, query, bias=config.query_bias)
        self.k_proj = linear(config.hidden_size, key, bias=config.query_bias)
        self.v_proj = linear(config.hidden_size, key, bias=config.query_bias)
        self.o_proj = linear(query, config.hidden_size, bias=config.output_bias)
        if config.normalizes_heads:
            self.q_norm = _Weight(config.head_dim)
            self.k_norm = _Weight(config.head_dim)


class _FeedForward(nn.Module):
    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)


class _Layer(nn.Module):
    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _FeedForward(config)
        self.input_layernorm = _Weight(config.hidden_size)
        self.post_attention_layernorm = _Weight(config.hidden_size)


class _Rotary(nn.Module):
    """Frequencies [head_dim / 2], float32, on the host until the model is placed."""

    inv_freq: torch.Tensor

    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        self.register_buffer("inv_freq", frequencies(config), persistent=False)
        self.attention_scaling = 1.0


class _Decoder(nn.Module):
    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        self.embed_tokens = _Weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = _Weight(config.hidden_size)
        self.rotary_emb = _Rotary(config)


class LeanCausal(nn.Module):
    """The base. Once it is filled (`shell`), `places` are those of what is quantized, and `plain_names` the rest."""

    def __init__(self, config: LeanConfig) -> None:
        super().__init__()
        self.config = config
        self.places: Any = None
        self.plain_names: tuple[str, ...] = ()
        self.name_or_path = ""
        self.model = _Decoder(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head


def frequencies(config: LeanConfig) -> torch.Tensor:
    """Angle a position of each pair of a head's numbers, to the bits that transformers has: float32, on the host."""
    rotary, size = config.rope_parameters, config.head_dim
    with torch.device("cpu"):
        found = 1.0 / (rotary["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size))
        if rotary["rope_type"] == "linear":
            return found / rotary["factor"]
        if rotary["rope_type"] == "llama3":
            return _stretch(found, rotary)
        return found


def _stretch(found: torch.Tensor, rotary: Any) -> torch.Tensor:
    """Slow angles by `factor`, fast ones not, those between by a part of it (Llama 3.1)."""
    factor, low, high = rotary["factor"], rotary["low_freq_factor"], rotary["high_freq_factor"]
    length = rotary["original_max_position_embeddings"]
    wave = 2 * math.pi / found
    is_slow, is_fast = wave > length / low, wave < length / high
    slowed = torch.where(is_slow, found / factor, found)
    part = (length / wave - low) / (high - low)
    between = (1 - part) * slowed / factor + part * slowed
    return torch.where(~is_fast & ~is_slow, between, slowed)
