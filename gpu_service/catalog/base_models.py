"""Base models of a models directory as facts: read from config.json, tokenizer files and safetensors headers.

Loads no weight, runs no model code, and refuses what asks for either (`auto_map`, pickles) with a typed reason.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpu_service.catalog.tokenizer_files import read_json_object, read_tokenizer_facts
from gpu_service.catalog.weight_files import TensorFacts, list_weight_files, read_tensors, weights_digest
from gpu_service.domain.errors import Fault, Refusal

__all__ = ["BaseModel", "LinearLayer", "find_directory", "read", "read_directory", "scan", "weights_digest"]

# Every file through which a model can ask for its own code to be run.
_CODE_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
               "video_preprocessor_config.json", "generation_config.json")  # fmt: skip
_NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.(?P<inner>.+)\.weight$")


@dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """A linear layer of the decoder. `path` is its module path, e.g. `model.layers.0.self_attn.q_proj`."""

    path: str
    in_features: int
    out_features: int

    @property
    def leaf(self) -> str:
        """The last part of the path, which LoRA targets usually name."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model on disk. A model with a `problem` cannot be trained and its other facts may be zero or empty.

    `config_type` is config.json's `model_type`, empty if it names none. `max_position_embeddings` is 0 if unknown.
    `weights_digest` is empty until someone computed it; `head_parameters` counts a stored output head.
    """

    name: str
    directory: Path
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    config_type: str = ""
    hidden_size: int = 0
    intermediate_size: int = 0
    num_layers: int = 0
    vocabulary_size: int = 0
    max_position_embeddings: int = 0
    linear_layers: tuple[LinearLayer, ...] = field(default=(), repr=False)
    num_parameters: int = 0
    has_chat_template: bool = False
    size_bytes: int = 0
    weights_digest: str = ""
    problem: str = ""

    @property
    def num_linear_parameters(self) -> int:
        """Weights of the linear layers: what a quantization makes smaller."""
        return sum(layer.in_features * layer.out_features for layer in self.linear_layers)


def read(models_directory: Path, name: str) -> BaseModel:
    """The facts of `org/name`.

    Raises `Refusal`: MODEL_NOT_FOUND (details `available_models`, joined by commas), MODEL_INVALID with stage and file,
    REMOTE_CODE_REFUSED, PICKLE_REFUSED.
    """
    return read_directory(find_directory(models_directory, name), name)


def find_directory(models_directory: Path, name: str) -> Path:
    """The directory of `org/name`, which lies below `models_directory`. Raises `Refusal` MODEL_NOT_FOUND."""
    parts = name.split("/")
    if len(parts) == 2 and all(_NAME_PART.fullmatch(part) and ".." not in part for part in parts):
        directory = models_directory / parts[0] / parts[1]
        if directory.is_dir():
            return directory
    available = ",".join(found for found, _ in _list_directories(models_directory))
    raise Refusal(
        "MODEL_NOT_FOUND",
        Fault.USER,
        f"there is no base model {name!r} here; there are: {available.replace(',', ', ') or 'none'}",
        stage="CONFIG",
        field="base_model",
        details={"available_models": available},
    )


def scan(models_directory: Path) -> list[BaseModel]:
    """Every model below the directory by name; one that cannot be trained has a `problem` instead of raising."""
    models = []
    for name, directory in _list_directories(models_directory):
        try:
            models.append(read_directory(directory, name))
        except Refusal as refusal:
            models.append(BaseModel(name=name, directory=directory, problem=str(refusal)))
    return models


def read_directory(directory: Path, name: str) -> BaseModel:
    """The facts of the model in this directory. Raises `Refusal` as `read` does, but for MODEL_NOT_FOUND."""
    config = read_json_object(directory / "config.json", stage="CONFIG")
    if not config:
        raise _invalid_config("config.json is missing or empty")
    _refuse_remote_code(directory)
    if "quantization_config" in config:
        raise _invalid_config(
            "config.json: the weights are quantized already; a base must hold them as they were trained"
        )
    base = BaseModel(
        name=name,
        directory=directory,
        config=config,
        config_type=_read_config_type(config),
        hidden_size=_read_size(config, "hidden_size"),
        intermediate_size=_read_size(config, "intermediate_size"),
        num_layers=_read_size(config, "num_hidden_layers"),
        vocabulary_size=_read_size(config, "vocab_size"),
        max_position_embeddings=_read_size(config, "max_position_embeddings", required=False),
    )
    tokenizer = read_tokenizer_facts(directory)
    files = list_weight_files(directory)
    tensors = read_tensors(files)
    return replace(
        base,
        linear_layers=tuple(_list_linear_layers(tensors)),
        num_parameters=sum(tensor.num_elements for tensor in tensors),
        has_chat_template=tokenizer.chat_template is not None,
        size_bytes=sum(path.stat().st_size for path in files),
    )


def _list_directories(models_directory: Path) -> list[tuple[str, Path]]:
    """`org/name` and directory of everything with a config.json two levels down, by name; no hidden one."""
    found = []
    for config in models_directory.glob("*/*/config.json"):
        organization, model = config.parent.parent.name, config.parent.name
        if _NAME_PART.fullmatch(organization) and _NAME_PART.fullmatch(model):
            found.append((f"{organization}/{model}", config.parent))
    return sorted(found)


def _list_linear_layers(tensors: list[TensorFacts]) -> list[LinearLayer]:
    """The matrices under the decoder's layers. Embeddings and head lie outside them; norms are vectors."""
    layers = [
        LinearLayer(path=tensor.name.removesuffix(".weight"), in_features=tensor.shape[1], out_features=tensor.shape[0])
        for tensor in tensors
        if len(tensor.shape) == 2 and _DECODER_LAYER.search(tensor.name)
    ]
    return sorted(layers, key=lambda layer: [int(part) if part.isdecimal() else part for part in layer.path.split(".")])


def _refuse_remote_code(directory: Path) -> None:
    for file in _CODE_FILES:
        if "auto_map" in read_json_object(directory / file, stage="TOKENIZER" if "token" in file else "CONFIG"):
            raise Refusal(
                "REMOTE_CODE_REFUSED",
                Fault.USER,
                f"{file} has `auto_map`: the model wants its own code run, and remote code is never run",
                stage="TOKENIZER" if "token" in file else "CONFIG",
                file=file,
            )


def _read_config_type(config: Mapping[str, Any]) -> str:
    config_type = config.get("model_type", "")
    if not isinstance(config_type, str):
        raise _invalid_config(f"config.json: model_type is {config_type!r}, which is no name")
    return config_type


def _read_size(config: Mapping[str, Any], name: str, *, required: bool = True) -> int:
    value = config.get(name)
    if value is None and not required:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise _invalid_config(f"config.json: {name} is {value!r}, which is no positive whole number")
    return value


def _invalid_config(message: str) -> Refusal:
    return Refusal("MODEL_INVALID", Fault.USER, message, stage="CONFIG", file="config.json")
