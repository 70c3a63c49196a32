"""Turns one GGUF file into a Hugging Face directory: config, dequantized safetensors, tokenizer, chat template.

It refuses a file whose tensors do not fill the whole model, and a tokenizer whose splitting rule is not known.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from gguf import GGUFReader
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from gpu_service.engine.importing.errors import ImportRefused, Reason, storage_errors
from gpu_service.engine.importing.tokenizer_rules import apply_splitting_rule

MAX_SHARD_SIZE = "4GB"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# What transformers raises for a file that is not GGUF, is cut short, or holds an architecture it does not know.
_LIBRARY_ERRORS = (ValueError, KeyError, IndexError, TypeError, NotImplementedError, RuntimeError, OSError)

# What the libraries note about where a model was loaded from, which says nothing about the model.
_SOURCE_NOTES = ("_name_or_path", "_model_name_or_path", "is_local", "local_files_only")


def convert_gguf(source: Path, destination: Path, dtype_name: str) -> None:
    """Write the model in `source` to the existing empty directory `destination`."""
    if not source.is_file():
        raise ImportRefused(Reason.SOURCE_NOT_FOUND, f"there is no file {source}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = _read_tokenizer(source)
        model = _read_model(source, DTYPES[dtype_name])
    except _LIBRARY_ERRORS as error:
        raise ImportRefused(
            Reason.INVALID_MODEL, f"{source.name} could not be read as GGUF: {type(error).__name__}: {error}"
        ) from error
    try:
        with storage_errors():
            model.save_pretrained(destination, max_shard_size=MAX_SHARD_SIZE)
            tokenizer.save_pretrained(destination)
            _drop_keys(destination / "config.json", _SOURCE_NOTES)
            _drop_keys(destination / "tokenizer_config.json", _SOURCE_NOTES)
    except SafetensorError as error:
        raise ImportRefused(Reason.STORAGE_FAILED, f"the weights could not be written: {error}") from error


def _read_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    reader = GGUFReader(source)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    apply_splitting_rule(
        tokenizer.backend_tokenizer,
        _text_field(reader, "tokenizer.ggml.model") or "",
        _text_field(reader, "tokenizer.ggml.pre"),
    )
    return tokenizer


def _text_field(reader: GGUFReader, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else str(field.contents())


def _read_model(source: Path, dtype: torch.dtype) -> PreTrainedModel:
    loaded, report = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=dtype, output_loading_info=True, trust_remote_code=False
    )
    absent = sorted(str(key) for key in [*report["missing_keys"], *report["mismatched_keys"]])
    if absent:
        raise ImportRefused(
            Reason.INVALID_MODEL, f"{source.name} lacks {len(absent)} of the model's tensors, such as {absent[0]}"
        )
    # transformers refuses to save the loaded object, because its config says that it is quantized with gguf. Its
    # tensors are dequantized, so they go into a model that is built from the same config without that mark.
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    fresh.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    fresh.tie_weights()
    return fresh


def _drop_keys(path: Path, keys: tuple[str, ...]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
