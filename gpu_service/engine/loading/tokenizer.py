"""Stage TOKENIZER: the tokenizer's files become a tokenizer, guided by the config object of the stage before.

The config is passed on, so that transformers never reads config.json a second time into something else: that second
reading is what failed in 4.57.2 (docs/model-loading.md).
"""

from __future__ import annotations

from typing import Any

from gpu_service.engine import libraries
from gpu_service.engine.failures import LoadFailure, from_exception
from gpu_service.engine.loading.work import Loaded, LoadRequest, Progress

# AutoTokenizer raises OSError and ValueError for files that are missing or contradict each other, ImportError for a
# missing backend, and KeyError, TypeError or AttributeError for files of another shape than it expects.
RAISES: tuple[type[Exception], ...] = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError)

# One of these holds the vocabulary; the first is the one that is looked for.
_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def run(request: LoadRequest, loaded: Loaded, progress: Progress) -> dict[str, str]:
    """Make `loaded.tokenizer`."""
    present = [name for name in _VOCABULARY_FILES if (request.model_directory / name).is_file()]
    loaded.file = present[0] if present else _VOCABULARY_FILES[0]
    progress(0, 1, "files")
    if not present:
        # Without a vocabulary transformers would make an empty tokenizer and say nothing.
        raise FileNotFoundError(f"no vocabulary file; looked for {', '.join(_VOCABULARY_FILES)}")
    kept = None if request.tokenizers is None else request.tokenizers.find(request.model_directory)
    if kept is None and request.is_lean:
        # Rows are tokens already; what is saved needs it, and reading one of a large vocabulary takes a second.
        loaded.read_tokenizer = lambda: _read_late(request)
        progress(1, 1, "files")
        return {"read": "when it is saved"}
    tokenizer = kept if kept is not None else _read(request, loaded.config)
    loaded.tokenizer = tokenizer
    progress(1, 1, "files")
    details = {"tokenizer_class": type(tokenizer).__name__, "vocabulary_size": str(len(tokenizer))}
    return details if kept is None else details | {"resident": "true"}


def _read(request: LoadRequest, config: Any) -> Any:
    # Not imported where nothing is read: it takes seconds.
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    tokenizer = AutoTokenizer.from_pretrained(
        request.model_directory, config=config, trust_remote_code=False, local_files_only=True
    )
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    if request.tokenizers is not None:
        request.tokenizers.put(request.model_directory, tokenizer)
    return tokenizer


def _read_late(request: LoadRequest) -> Any:
    """The tokenizer of a run that had no use for it until now. Raises LoadFailure as the stage would have."""
    libraries.need(request.pace.note_progress)
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(request.model_directory, trust_remote_code=False, local_files_only=True)
        return _read(request, config)
    except RAISES as error:
        raise LoadFailure(
            from_exception(error, reason="LOAD_TOKENIZER", fault="USER", stage="TOKENIZER", file=_VOCABULARY_FILES[0])
        ) from error
