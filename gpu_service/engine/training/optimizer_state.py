"""An optimizer's state as flat tensors and JSON values, back again, and the digest of what an optimizer really holds.

Knows no optimizer by name: whatever nesting `state_dict` has comes back as it was. Writes no file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.engine.pace import NOBODY, Pace

_SEPARATOR = "/"


@dataclass(frozen=True, kw_only=True)
class FlatState:
    """`tensors` by `<parameter index>/<name>[/<name>...]`, `values` likewise, and the parameter groups' settings."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]
    groups: list[dict[str, Any]]

    def document(self) -> dict[str, Any]:
        """All but the tensors, as JSON."""
        return {"values": self.values, "param_groups": self.groups}


def flatten(optimizer: Any) -> FlatState:
    """The optimizer's state now; tensors are its own, not copies."""
    state = optimizer.state_dict()
    flat = FlatState(tensors={}, values={}, groups=state["param_groups"])
    for index, entry in state["state"].items():
        _flatten_into(flat, str(index), entry)
    return flat


def _flatten_into(flat: FlatState, prefix: str, entry: Mapping[str, Any]) -> None:
    for name, value in entry.items():
        key = f"{prefix}{_SEPARATOR}{name}"
        if isinstance(value, torch.Tensor):
            flat.tensors[key] = value
        elif isinstance(value, Mapping):
            # bitsandbytes keeps its quantized moments one level down.
            _flatten_into(flat, key, value)
        else:
            flat.values[key] = value


def apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, none of which shares memory with another: bitsandbytes has one table for all parameters."""
    seen: set[int] = set()
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        result[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return result


def load(optimizer: Any, document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put what `flatten` gave into `optimizer`. Raises KeyError, ValueError, and what the optimizer refuses with."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in (*document["values"].items(), *tensors.items()):
        index, *path, name = key.split(_SEPARATOR)
        entry = state.setdefault(int(index), {})
        for part in path:
            entry = entry.setdefault(part, {})
        entry[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": document["param_groups"]})


def digest_of_optimizer(optimizer: Any, pace: Pace = NOBODY) -> str:
    """Lower-case hex SHA-256 over every moment, counter and setting that the optimizer holds now, on any device."""
    flat = flatten(optimizer)
    return _digest(flat.tensors, flat.document(), pace)


def digest_of_tensors(tensors: Mapping[str, torch.Tensor], pace: Pace = NOBODY) -> str:
    """Lower-case hex SHA-256 over names, types, shapes and bytes of tensors, on any device."""
    return _digest(tensors, {}, pace)


def _digest(tensors: Mapping[str, torch.Tensor], document: Mapping[str, Any], pace: Pace) -> str:
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # One tensor at a time on the host: the whole state may be larger than what is free there.
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        pace.note_progress()
    return digest.hexdigest()
