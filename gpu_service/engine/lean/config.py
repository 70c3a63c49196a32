"""config.json of a Llama-like model as the few facts that the fast path needs, or the word that it takes the library.

What a file leaves out and every family has the same default for is here; all else is for the library to say. Makes no
config object of transformers, and writes no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class TakesTheLibrary(ValueError):
    """This model cannot be made here; transformers has to."""


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What a family's layers have, as far as a config.json does not say it."""

    # Biases of query, key and value; None: by `attention_bias`, the output's too.
    query_bias: bool | None
    reads_mlp_bias: bool = False
    normalizes_heads: bool = False
    # Whether `head_dim` may be absent, and then follows from the hidden size.
    derives_head_dim: bool = True


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(query_bias=None, reads_mlp_bias=True),
    "mistral": _Family(query_bias=False),
    "qwen2": _Family(query_bias=True),
    "qwen3": _Family(query_bias=None, normalizes_heads=True, derives_head_dim=False),
}
# What transformers takes where config.json is silent.
_EPSILON, _THETA = 1e-6, 10000.0
_ROTARY_FACTS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class LeanConfig:
    """Sizes in numbers of weights; `rope_parameters` has `rope_type`, `rope_theta` and what the type needs."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    query_bias: bool
    output_bias: bool
    mlp_bias: bool
    normalizes_heads: bool
    rope_parameters: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> LeanConfig:
        """Raises OSError, TakesTheLibrary."""
        try:
            values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise TakesTheLibrary(f"config.json is no JSON: {error}") from error
        if not isinstance(values, dict) or "quantization_config" in values:
            raise TakesTheLibrary("config.json is not that of a plain model")
        family = _FAMILIES.get(values.get("model_type", ""))
        if family is None or values.get("hidden_act", "silu") != "silu":
            raise TakesTheLibrary(f"config.json: model_type is {values.get('model_type')!r}")
        hidden, heads = _whole(values, "hidden_size"), _whole(values, "num_attention_heads")
        if hidden % heads:
            raise TakesTheLibrary("config.json: the hidden size is no multiple of the number of heads")
        derived = hidden // heads if family.derives_head_dim and values.get("head_dim") is None else None
        attention_bias = _flag(values, "attention_bias") if family.query_bias is None else False
        return cls(
            model_type=values["model_type"],
            vocab_size=_whole(values, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_whole(values, "intermediate_size"),
            num_hidden_layers=_whole(values, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_whole(values, "num_key_value_heads"),
            head_dim=_whole(values, "head_dim") if derived is None else derived,
            rms_norm_eps=_number({"rms_norm_eps": _EPSILON, **values}, "rms_norm_eps"),
            tie_word_embeddings=_flag(values, "tie_word_embeddings"),
            query_bias=attention_bias if family.query_bias is None else family.query_bias,
            output_bias=attention_bias,
            mlp_bias=_flag(values, "mlp_bias") if family.reads_mlp_bias else False,
            normalizes_heads=family.normalizes_heads,
            rope_parameters=_read_rotary(values),
        )


def _read_rotary(values: Mapping[str, Any]) -> dict[str, Any]:
    """In either of the two forms that config files have, never a mixture."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if new is not None and (not isinstance(new, dict) or old is not None or "rope_theta" in values):
        raise TakesTheLibrary("config.json says twice how positions are rotated")
    found = dict(new) if new is not None else {"rope_theta": values.get("rope_theta", _THETA), **(old or {})}
    kind = found["rope_type"] = found.get("rope_type", found.pop("type", "default"))
    if kind not in _ROTARY_FACTS:
        raise TakesTheLibrary(f"config.json: positions are rotated by {kind!r}")
    if found.get("partial_rotary_factor", values.get("partial_rotary_factor", 1)) not in (1, None):
        raise TakesTheLibrary("config.json: a part of each head is rotated")
    for name in ("rope_theta", *_ROTARY_FACTS[kind]):
        _number(found, name)
    return found


def _whole(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise TakesTheLibrary(f"config.json: {name} is {value!r}")
    return value


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise TakesTheLibrary(f"config.json: {name} is {value!r}")
    return value


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name, False)
    if not isinstance(value, bool):
        raise TakesTheLibrary(f"config.json: {name} is {value!r}")
    return value
