"""Writes base models of real shapes and random weights, for measurements of memory and time. They have learned nothing.

Weights are drawn on the device when there is one and written as safetensors; the tokenizer is a byte a token, so that
the length of a text is its number of tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
_SHARD_BYTES = 4 * 1024**3
_STANDARD_DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama's sizes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every stored tensor."""
        key_value = self.key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (key_value, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (key_value, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(hidden=64, intermediate=128, layers=2, heads=4, key_value_heads=2, vocabulary=512, tied=True),
    "0.1B": Shape(hidden=768, intermediate=2048, layers=12, heads=12, key_value_heads=12, vocabulary=32000, tied=True),
    "0.5B": Shape(hidden=896, intermediate=4864, layers=24, heads=14, key_value_heads=2, vocabulary=151936, tied=True),
    "1B": Shape(hidden=2048, intermediate=8192, layers=16, heads=32, key_value_heads=8, vocabulary=128256, tied=True),
    "3B": Shape(hidden=3072, intermediate=8192, layers=28, heads=24, key_value_heads=8, vocabulary=128256, tied=True),
    "8B": Shape(hidden=4096, intermediate=14336, layers=32, heads=32, key_value_heads=8, vocabulary=128256, tied=False),
}


def place(models_directory: Path, size: str) -> str:
    """Write the model of one of SHAPES below `models_directory`; its name, `random/<size>`."""
    shape = SHAPES[size]
    directory = models_directory / "random" / size
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 32768,
        "eos_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _write_tokenizer(directory)
    _write_weights(directory, shape)
    return f"random/{size}"


def remove(models_directory: Path, name: str) -> None:
    """Give the disk back."""
    shutil.rmtree(models_directory / name)


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: identifier for identifier, token in enumerate([END_OF_TEXT, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "model_max_length": 32768}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _write_weights(directory: Path, shape: Shape) -> None:
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards: list[dict[str, torch.Tensor]] = [{}]
    size_bytes = 0
    for name, sizes in shape.tensors():
        if len(sizes) == 1:
            tensor = torch.ones(sizes, dtype=torch.bfloat16)
        else:
            tensor = torch.empty(sizes, dtype=torch.bfloat16, device=device).normal_(std=_STANDARD_DEVIATION).cpu()
        if size_bytes + tensor.nbytes > _SHARD_BYTES:
            shards.append({})
            size_bytes = 0
        shards[-1][name] = tensor
        size_bytes += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()
    size_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
