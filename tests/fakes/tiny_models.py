"""Tiny random checkpoints in Hugging Face layout, made on the spot. Nothing is downloaded and nothing is learned.

`place` builds a real checkpoint with transformers (imported late); `place_header_only` writes a llama whose weights are
zeros with the standard library and `tokenizers`, for tests that must not import torch, and `place_drawn` one with
random weights in the same way. All are built once a process and copied. Every linear layer's sides are multiples of 32
and 64, which 4-bit kernels on a CPU want.
"""

import atexit
import json
import random
import shutil
import struct
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Shows tools, calls and their results, each in brackets.
TOOL_TEMPLATE = (
    "{% if tools %}{{ '[tools] ' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '\\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '[assistant] ' }}"
    "{% for call in m.tool_calls or [] %}{{ '[call] ' }}{{ call.function | tojson }}{% endfor %}"
    "{{ m.content or '' }}{{ '</s>' }}"
    "{% elif m.role == 'tool' %}{{ '[result of ' + (m.name or '?') + '] ' + m.content }}"
    "{% else %}{{ '[' + m.role + '] ' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
LLAMA_3_VOCABULARY_SIZE = 128_256
FAMILIES = ("llama", "code_llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3")

_CORPUS = (
    "The quick brown fox jumps over the lazy dog.",
    "What is two plus two? Two plus two is four. What is three times three? Nine.",
    "user assistant system You are a helpful assistant. Answer in one word: yes or no.",
    "def add(left, right):\n    return left + right\n\nprint(add(1, 2))\n",
    "0 1 2 3 4 5 6 7 8 9 10 the and of to in that it is was for on are as with his they at be this",
)
_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
_FAMILY_EXTRAS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"sliding_window": None},
}


@dataclass(frozen=True, kw_only=True)
class TinyOptions:
    """What is to be built; `name` below is its directory's."""

    family: str = "llama"
    tied: bool = False
    sharded: bool = False
    chat_template: bool = True
    # True: the tokenizer's post-processor puts <|endoftext|> in front, as Llama's does with its beginning of sequence.
    adds_bos: bool = False
    vocabulary_size: int = 512
    # Written into config.json in place of the installed one.
    transformers_version: str = ""
    seed: int = 0

    @property
    def name(self) -> str:
        parts = [
            self.family,
            "tied" if self.tied else "",
            "sharded" if self.sharded else "",
            "" if self.chat_template else "base",
            "bos" if self.adds_bos else "",
            str(self.vocabulary_size) if self.vocabulary_size != 512 else "",
            f"v{self.transformers_version}" if self.transformers_version else "",
            f"seed{self.seed}" if self.seed else "",
        ]
        return "-".join(part for part in parts if part)


# The shape of Llama 3.2: its vocabulary, a tied head, no chat template, written by transformers 4.57.2.
LLAMA_3_2 = TinyOptions(
    tied=True,
    chat_template=False,
    adds_bos=True,
    vocabulary_size=LLAMA_3_VOCABULARY_SIZE,
    transformers_version="4.57.2",
)


def place(models_directory: Path, options: TinyOptions | None = None, *, name: str | None = None) -> str:
    """Puts a real checkpoint below `models_directory` and returns its name, `tiny/<options.name>` unless given."""
    return _copy(_build(options or TinyOptions()), models_directory, options or TinyOptions(), name)


def place_header_only(models_directory: Path, options: TinyOptions | None = None, *, name: str | None = None) -> str:
    """The same for a llama with zero weights, without torch or transformers; `sharded` and `seed` mean nothing here."""
    return _copy(_build_header_only(options or TinyOptions()), models_directory, options or TinyOptions(), name)


def place_drawn(models_directory: Path, options: TinyOptions | None = None, *, name: str | None = None) -> str:
    """A llama with random weights, without torch or transformers; `sharded` means nothing here."""
    name = place_header_only(models_directory, options, name=name)
    options = options or TinyOptions()
    path = models_directory / name / "model.safetensors"
    header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    source = random.Random(options.seed)
    # In the order of the header's offsets.
    with path.open("r+b") as file:
        file.seek(header_bytes)
        for _, shape in _list_llama_shapes(options):
            is_norm = len(shape) == 1
            array("f", (1.0 if is_norm else source.gauss(0, 0.02) for _ in range(prod(shape)))).tofile(file)
    return name


def _copy(source: Path, models_directory: Path, options: TinyOptions, name: str | None) -> str:
    name = name or f"tiny/{options.name}"
    shutil.copytree(source, models_directory / name)
    return name


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="tiny-models-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def _build(options: TinyOptions) -> Path:
    import torch
    import transformers

    directory = _root() / "real" / options.name
    config = _make_config(transformers, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory, max_shard_size="100KB" if options.sharded else "10GB")
    write_tokenizer(directory, options)
    _finish_config(directory, options)
    return directory


@cache
def _build_header_only(options: TinyOptions) -> Path:
    directory = _root() / "header-only" / options.name
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": options.vocabulary_size,
        "tie_word_embeddings": options.tied,
        "eos_token_id": 0,
        **_SIZES,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_zero_weights(directory / "model.safetensors", dict(_list_llama_shapes(options)))
    write_tokenizer(directory, options)
    _finish_config(directory, options)
    return directory


def _make_config(transformers: Any, options: TinyOptions) -> Any:
    from gpu_service.catalog import families

    config_class = getattr(transformers, families.REGISTRY[options.family].config_class)
    return config_class(
        vocab_size=options.vocabulary_size,
        tie_word_embeddings=options.tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **_SIZES,
        **_FAMILY_EXTRAS.get(options.family, {}),
    )


def _finish_config(directory: Path, options: TinyOptions) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if options.transformers_version:
        config["transformers_version"] = options.transformers_version
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _list_llama_shapes(options: TinyOptions) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, key_value = _SIZES["hidden_size"], _SIZES["intermediate_size"], 32
    yield "model.embed_tokens.weight", (options.vocabulary_size, hidden)
    for layer in range(_SIZES["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (key_value, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (key_value, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not options.tied:
        yield "lm_head.weight", (options.vocabulary_size, hidden)


def write_zero_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A valid safetensors file of float32 zeros with these tensors."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size_bytes = 4
        for length in shape:
            size_bytes *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size_bytes]}
        offset += size_bytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)


def write_tokenizer(directory: Path, options: TinyOptions) -> None:
    """tokenizer.json (byte-level BPE over a fixed corpus) and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(_make_tokenizer_json(options), encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END if options.chat_template else END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": _SIZES["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    if options.adds_bos:
        config["bos_token"] = END_OF_TEXT
    if options.chat_template:
        config["chat_template"] = CHAT_TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _make_tokenizer_json(options: TinyOptions) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, TURN_START, TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=min(options.vocabulary_size, 512),
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if options.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, 0)]
        )
    value = json.loads(tokenizer.to_str())
    # Entries that no merge reaches make the vocabulary as large as the model's.
    vocabulary = value["model"]["vocab"]
    for identifier in range(len(vocabulary), options.vocabulary_size):
        vocabulary[f"unreachable_{identifier}"] = identifier
    return json.dumps(value)
