"""Which `tokenizers` object stands for a model's tokenizer: the file's own, or what `transformers` makes of it.

`transformers` loads tokenizer.json as it is for some tokenizer classes and rebuilds the pipeline from its vocabulary
for all others (a Llama tokenizer without `legacy` gets another pre-tokenizer, for one). The planner must give the ids
that `AutoTokenizer` gives, so in the second case, and where there is no tokenizer.json, it asks `transformers` once and
keeps the answer in the cache. The first case needs no training library. It runs no code of the model's in either.
"""

import hashlib
import importlib
import importlib.metadata
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gpu_service.catalog.tokenizer_files import FAST_FILE, TokenizerFacts, tokenizer_digest
from gpu_service.domain.errors import Fault, Refusal

# Tokenizer classes for which tokenizer.json is the whole truth.
_VERBATIM_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
# Ids of special tokens, by text, beside a kept tokenizer.
_IDS_SUFFIX = ".ids.json"
# Config types for which transformers takes its own class whatever the model's files name.
_OVERRULED_CONFIG_TYPES = frozenset({"qwen2"})


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """`digest` names everything that decides the tokenizer's ids; `special_ids` has that of each special token's text.

    Where all tokens of a plan are in the cache already, the tokenizer itself is never read: a large one takes a second.
    """

    read: Callable[[], Any]
    special_tokens: Mapping[str, str]
    special_ids: Mapping[str, int | None]
    digest: str

    @cached_property
    def backend(self) -> Any:
        """A `tokenizers.Tokenizer`. Raises `Refusal` MODEL_INVALID."""
        return self.read()


def load_source(
    directory: Path, facts: TokenizerFacts, *, config_type: str, cache_directory: Path, keeps_ids: bool = False
) -> TokenizerSource:
    """`keeps_ids`: a tokenizer that is read now need not be read again where nothing is tokenized.

    Raises `Refusal` MODEL_INVALID (stage TOKENIZER) with the library's own exception type and message.
    """
    digest = tokenizer_digest(directory)
    verbatim = facts.tokenizer_class in _VERBATIM_CLASSES and config_type not in _OVERRULED_CONFIG_TYPES
    if facts.has_fast_file and verbatim:
        return _make(lambda: _load(directory), facts.special_tokens, digest, cache_directory, keeps_ids)
    version = importlib.metadata.version("transformers")
    digest = hashlib.sha256(f"{digest}\ntransformers {version}".encode()).hexdigest()
    path = cache_directory / "tokenizers" / f"{digest}.json"
    kept = _read_kept(path)
    if kept is None:
        kept = _convert(directory)
        _keep(path, kept)
    text = kept["tokenizer"]
    return _make(lambda: Tokenizer.from_str(text), kept["special_tokens"], digest, cache_directory, keeps_ids)


def _make(
    read: Callable[[], Any], special_tokens: Mapping[str, str], digest: str, cache_directory: Path, keeps_ids: bool
) -> TokenizerSource:
    """Reads the tokenizer at once unless it was read before: then what is asked of every one is in the cache."""
    path = cache_directory / "tokenizers" / f"{digest}{_IDS_SUFFIX}"
    ids = _read_object(path)
    if ids is not None:
        return TokenizerSource(read=read, special_tokens=special_tokens, special_ids=ids, digest=digest)
    backend = read()
    ids = {text: backend.token_to_id(text) for text in special_tokens.values()}
    if keeps_ids:
        _keep(path, ids)
    return TokenizerSource(read=lambda: backend, special_tokens=special_tokens, special_ids=ids, digest=digest)


def _load(directory: Path) -> Any:
    try:
        return Tokenizer.from_file(str(directory / FAST_FILE))
    except Exception as error:
        raise _invalid(FAST_FILE, error) from error


def _convert(directory: Path) -> dict[str, Any]:
    transformers = importlib.import_module("transformers")
    try:
        converted = transformers.AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise _invalid("", error) from error
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise _invalid("", TypeError(f"{type(converted).__name__} has no fast form"))
    special = {name: str(token) for name, token in converted.special_tokens_map.items() if isinstance(token, str)}
    return {"tokenizer": backend.to_str(), "special_tokens": special}


def _read_kept(path: Path) -> dict[str, Any] | None:
    kept = _read_object(path)
    whole = kept is not None and isinstance(kept.get("tokenizer"), str) and "special_tokens" in kept
    return kept if whole else None


def _read_object(path: Path) -> dict[str, Any] | None:
    """What was kept, None when there is nothing or it cannot be read: it only saves time."""
    try:
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) else None


def _keep(path: Path, kept: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".staging-{secrets.token_hex(8)}")
    staged.write_text(json.dumps(kept), encoding="utf-8")
    staged.replace(path)


def _invalid(file: str, error: Exception) -> Refusal:
    return Refusal(
        "MODEL_INVALID",
        Fault.USER,
        f"the tokenizer cannot be loaded: {error}",
        stage="TOKENIZER",
        exception_type=f"{type(error).__module__}.{type(error).__qualname__}",
        file=file,
    )
