"""Weight files as facts: names, safetensors headers, digests. Reads no tensor, loads no pickle."""

import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_service.catalog.known_files import FileIdentity
from gpu_service.domain.errors import Fault, Refusal

# In a node's cache: what was hashed, by resolved path.
CACHE_FILE = "weights-digests.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# The format's own limit on a header; a larger length is a damaged or hostile file.
_MAXIMUM_HEADER_BYTES = 100_000_000
_MAXIMUM_INDEX_BYTES = 64 * 1024 * 1024
_MAXIMUM_SHARDS = 4096
_HASH_CHUNK_BYTES = 4 * 1024 * 1024
_HEX_CHARACTERS = 64
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """`dtype` is safetensors' word, e.g. `BF16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def list_weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make the model, by name.

    Raises `Refusal`: PICKLE_REFUSED when there are only pickles, MODEL_INVALID when nothing or a shard is missing.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        return _read_index(directory, index)
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    others = sorted(path.name for path in directory.glob("*") if path.suffix in _PICKLE_SUFFIXES)
    if others:
        raise Refusal(
            "PICKLE_REFUSED",
            Fault.USER,
            f"the weights are pickled ({others[0]}); pickle is never loaded: convert them to safetensors",
            stage="WEIGHTS",
            file=others[0],
        )
    raise invalid_weights(SINGLE_FILE, f"there is neither {SINGLE_FILE} nor {INDEX_FILE}")


def read_tensors(files: list[Path]) -> list[TensorFacts]:
    """Every tensor of these files, from their headers. Raises `Refusal` MODEL_INVALID naming the file."""
    tensors: dict[str, TensorFacts] = {}
    for path in files:
        for tensor in _read_header(path):
            if tensor.name in tensors:
                raise invalid_weights(path.name, f"tensor {tensor.name!r} is in more than one file")
            tensors[tensor.name] = tensor
    return list(tensors.values())


def weights_digest(directory: Path, cache_file: Path | None = None) -> str:
    """Lower-case hex SHA-256 over name and SHA-256 of each weight file: minutes for large models.

    `cache_file` remembers each file's hash with its identity (`known_files`). Raises as `list_weight_files` does, and
    `Refusal` MODEL_INVALID when a file cannot be read.
    """
    remembered = _read_cache(cache_file)
    fresh: dict[str, Any] = {}
    hashes: dict[str, str] = {}
    for path in list_weight_files(directory):
        try:
            before = FileIdentity.of(path)
            known = _find_hash(remembered, path, before)
            if known is None:
                is_settled = before.is_settled()
                known = _hash_file(path)
                if is_settled and FileIdentity.of(path) == before:
                    fresh[str(path.resolve())] = {"identity": before.to_json(), "sha256": known}
            hashes[path.name] = known
        except OSError as error:
            raise invalid_weights(path.name, str(error.strerror)) from error
    if cache_file is not None and fresh:
        _write_cache(cache_file, {**remembered, **fresh})
    return _whole_digest(hashes)


def remembered_weights_digest(identities: Mapping[Path, FileIdentity], cache_file: Path) -> str:
    """The digest of files in this order by what `weights_digest` remembered; empty where one has to be hashed."""
    remembered = _read_cache(cache_file)
    hashes = {path.name: _find_hash(remembered, path, identity) for path, identity in identities.items()}
    known = {name: found for name, found in hashes.items() if found is not None}
    return _whole_digest(known) if known.keys() == hashes.keys() else ""


def invalid_weights(file: str, message: str) -> Refusal:
    """The refusal of a weight file."""
    return Refusal("MODEL_INVALID", Fault.USER, f"{file}: {message}", stage="WEIGHTS", file=file)


def _read_index(directory: Path, index: Path) -> list[Path]:
    try:
        if index.stat().st_size > _MAXIMUM_INDEX_BYTES:
            raise invalid_weights(INDEX_FILE, "the index is too large")
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise invalid_weights(INDEX_FILE, f"is not an index of shards ({type(error).__name__}: {error})") from error
    if not 0 < len(names) <= _MAXIMUM_SHARDS:
        raise invalid_weights(INDEX_FILE, f"lists {len(names)} shards")
    for name in names:
        # A name with a separator would lead out of the model's directory.
        if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
            raise invalid_weights(INDEX_FILE, f"names a shard outside the model: {name!r}")
        if Path(name).suffix in _PICKLE_SUFFIXES:
            raise Refusal("PICKLE_REFUSED", Fault.USER, f"{name} is a pickle", stage="WEIGHTS", file=name)
        if not (directory / name).is_file():
            raise invalid_weights(name, f"the shard that {INDEX_FILE} names is missing")
    return [directory / name for name in names]


def _read_header(path: Path) -> list[TensorFacts]:
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise invalid_weights(path.name, "is too short for a safetensors header")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(_MAXIMUM_HEADER_BYTES, size_bytes - 8):
                raise invalid_weights(path.name, f"declares a header of {length} bytes in a file of {size_bytes}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise invalid_weights(path.name, str(error.strerror)) from error
    except (ValueError, RecursionError) as error:
        raise invalid_weights(path.name, f"has no readable safetensors header ({error})") from error
    if not isinstance(header, dict):
        raise invalid_weights(path.name, "has no readable safetensors header")
    data_bytes = size_bytes - 8 - length
    return [_tensor(path.name, name, facts, data_bytes) for name, facts in header.items() if name != "__metadata__"]


def _tensor(file: str, name: str, facts: Mapping[str, Any], data_bytes: int) -> TensorFacts:
    try:
        dtype, shape, (start, end) = facts["dtype"], tuple(facts["shape"]), facts["data_offsets"]
        whole = all(isinstance(number, int) and number >= 0 for number in (*shape, start, end))
    except (KeyError, TypeError, ValueError) as error:
        raise invalid_weights(file, f"tensor {name!r} is not described as safetensors are") from error
    if not whole or not isinstance(dtype, str):
        raise invalid_weights(file, f"tensor {name!r} is not described as safetensors are")
    if end > data_bytes:
        raise invalid_weights(file, f"is cut off: tensor {name!r} ends at byte {end} of {data_bytes}")
    if dtype in _DTYPE_BYTES and end - start != _DTYPE_BYTES[dtype] * math.prod(shape):
        raise invalid_weights(file, f"tensor {name!r} has {end - start} bytes, which its shape contradicts")
    return TensorFacts(name=name, dtype=dtype, shape=shape)


def _whole_digest(hashes: Mapping[str, str]) -> str:
    whole = hashlib.sha256()
    for name, digest in hashes.items():
        whole.update(f"{name}\0{digest}\n".encode())
    return whole.hexdigest()


def _find_hash(remembered: Mapping[str, Any], path: Path, identity: FileIdentity) -> str | None:
    record = remembered.get(str(path.resolve()))
    if not isinstance(record, dict) or record.get("identity") != identity.to_json():
        return None
    digest = record.get("sha256")
    return digest if isinstance(digest, str) and len(digest) == _HEX_CHARACTERS else None


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read_cache(cache_file: Path | None) -> dict[str, Any]:
    """What was remembered; a cache that cannot be read is an empty one, since it only saves time."""
    if cache_file is None:
        return {}
    try:
        value = json.loads(cache_file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_cache(cache_file: Path, remembered: Mapping[str, Any]) -> None:
    """A cache that cannot be written, as on a full disk, costs the time of hashing again and nothing else."""
    staged = cache_file.with_name(f".{cache_file.name}.{secrets.token_hex(8)}")
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(remembered, sort_keys=True), encoding="utf-8")
        staged.replace(cache_file)
    except OSError:
        staged.unlink(missing_ok=True)
