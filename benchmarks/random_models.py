"""Writes base models of real shapes and random weights, for measurements of memory and time. They have learned nothing.

Weights are drawn on the device when there is one and written as safetensors; the tokenizer is a byte a token, so that
the length of a text is its number of tokens.

    python -m benchmarks.random_models --models DIR --size 3B
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_service.catalog.base_models import BaseModel, LinearLayer

if TYPE_CHECKING:
    import torch

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
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
    "135M": Shape(hidden=576, intermediate=1536, layers=30, heads=9, key_value_heads=3, vocabulary=49152, tied=True),
    "0.5B": Shape(hidden=896, intermediate=4864, layers=24, heads=14, key_value_heads=2, vocabulary=151936, tied=True),
    "1B": Shape(hidden=2048, intermediate=8192, layers=16, heads=32, key_value_heads=8, vocabulary=128256, tied=True),
    "3B": Shape(hidden=3072, intermediate=8192, layers=28, heads=24, key_value_heads=8, vocabulary=128256, tied=True),
    "8B": Shape(hidden=4096, intermediate=14336, layers=32, heads=32, key_value_heads=8, vocabulary=128256, tied=False),
}


def describe(size: str) -> BaseModel:
    """The facts of one of SHAPES, without a file."""
    shape = SHAPES[size]
    tensors = dict(shape.tensors())
    return BaseModel(
        name=f"random/{size}",
        directory=Path("random") / size,
        config=_config(shape),
        config_type="llama",
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_layers=shape.layers,
        vocabulary_size=shape.vocabulary,
        linear_layers=tuple(
            LinearLayer(path=name.removesuffix(".weight"), in_features=sizes[1], out_features=sizes[0])
            for name, sizes in tensors.items()
            if "_proj" in name
        ),
        num_parameters=sum(math.prod(sizes) for sizes in tensors.values()),
    )


def build(size: str, device: torch.device, *, in_nf4: bool) -> Any:
    """The model on `device`, frozen, in bfloat16; a few seconds for the largest, and none of it in host memory.

    `in_nf4`: every linear layer but the head is held by bitsandbytes, double quantized, as loading leaves it; what is
    not quantized stays in bfloat16.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        name: value for name, value in _config(SHAPES[size]).items() if name not in ("architectures", "model_type")
    }
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    drawn: dict[int, torch.nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in drawn:
                drawn[id(parameter)] = torch.nn.Parameter(
                    _draw(parameter.shape, device, generator), requires_grad=False
                )
            setattr(module, name, drawn[id(parameter)])
        for name, child in list(module.named_children()):
            if in_nf4 and isinstance(child, torch.nn.Linear) and name != "lm_head":
                setattr(module, name, _quantize(child, device, generator))
    # What a meta device has no numbers for: they are made again.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    model.config._attn_implementation = "sdpa"
    return model.train()


def _draw(sizes: torch.Size, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    import torch

    if len(sizes) == 1:
        return torch.ones(sizes, dtype=torch.bfloat16, device=device)
    empty = torch.empty(sizes, dtype=torch.bfloat16, device=device)
    return empty.normal_(std=_STANDARD_DEVIATION, generator=generator)


def _quantize(linear: Any, device: torch.device, generator: torch.Generator) -> Any:
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    held = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    weight = _draw(linear.weight.shape, device, generator)
    held.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to(device)
    return held


def place(models_directory: Path, size: str) -> str:
    """Write the model of one of SHAPES below `models_directory`; its name, `random/<size>`."""
    shape = SHAPES[size]
    directory = models_directory / "random" / size
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=2), encoding="utf-8")
    _write_tokenizer(directory)
    _write_weights(directory, shape)
    return f"random/{size}"


def remove(models_directory: Path, name: str) -> None:
    """Give the disk back."""
    shutil.rmtree(models_directory / name)


def _config(shape: Shape) -> dict[str, Any]:
    return {
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


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: identifier for identifier, token in enumerate([END_OF_TEXT, *alphabet, PADDING])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (END_OF_TEXT, PADDING)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        # Unsloth would take another token for padding, or add one to the model.
        "pad_token": PADDING,
        "model_max_length": 32768,
    }
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
    weight_map, total_bytes = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
        shard.clear()
    # transformers up to 5.17 does not read an index without its metadata.
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def main() -> None:
    """Writes one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--size", choices=tuple(SHAPES), required=True)
    arguments = parser.parse_args()
    print(place(arguments.models, arguments.size))


if __name__ == "__main__":
    main()
