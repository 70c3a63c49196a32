"""The trained weights: every A and B of a PEFT model in one flat float32 buffer, of which PEFT's parameters are views.

So one launch is an optimizer's step and one a norm, and whatever writes PEFT's parameters (a checkpoint, an earlier
job's adapter) writes the buffer. Products are made with a copy in the compute type, laid out as `frozen` wants it.
Knows LoRA without bias or DoRA, one adapter, and refuses any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.engine.fast_path.frozen import Margins

_NAME = "default"
# Margins are this wide or a multiple of it: rows then begin where products read fastest.
_ROOM_COLUMNS = 64


class AdapterNotSupported(ValueError):
    """What is trained is not what the fast path trains."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One layer's A and B: where they begin in the flat buffer, and where their layer stands in its group."""

    start_a: int
    start_b: int
    # First column of the group's margin, and first row of its layer in the group's output.
    first_rank: int
    first_row: int
    num_rows: int


class AdapterGroup:
    """The adapters of layers that read the same rows. `room` is 0 where none of them has one."""

    def __init__(self, *, rank: int, in_features: int, num_rows: int, scaling: float, parts: Sequence[_Part]) -> None:
        self.rank = rank
        self.in_features = in_features
        self.num_rows = num_rows
        self.scaling = scaling
        self.parts = tuple(parts)
        # Of the room's columns the first so many are ranks.
        self.num_ranks = rank * len(parts)
        self.room = -(-self.num_ranks // _ROOM_COLUMNS) * _ROOM_COLUMNS

    @property
    def place(self) -> slice:
        """Of all its A and B in the flat buffer: they lie end to end."""
        if not self.parts:
            return slice(0, 0)
        last = self.parts[-1]
        return slice(self.parts[0].start_a, last.start_b + last.num_rows * self.rank)

    def copies(self, margins: Margins) -> list[tuple[int, torch.Tensor, float]]:
        """What goes from the flat buffer into the margins: start, matrix, factor. B goes times the scaling."""
        found = []
        for part in self.parts:
            ranks = slice(part.first_rank, part.first_rank + self.rank)
            rows = slice(part.first_row, part.first_row + part.num_rows)
            found.append((part.start_a, margins.below[ranks], 1.0))
            found.append((part.start_b, margins.right[rows, ranks], self.scaling))
        return found

    def view_all_a(self, flat: torch.Tensor) -> torch.Tensor:
        """All A of the group, one below another: they lie end to end."""
        start, size = self.parts[0].start_a, len(self.parts) * self.rank * self.in_features
        return flat[start : start + size].view(-1, self.in_features)

    def view_b(self, flat: torch.Tensor, part: _Part) -> torch.Tensor:
        """B [rows, rank] in a flat buffer."""
        size = part.num_rows * self.rank
        return flat[part.start_b : part.start_b + size].view(part.num_rows, self.rank)


class FlatAdapter:
    """All adapters of a PEFT model. `parameter` is what the optimizer steps; `groups` are in the order given."""

    def __init__(self, model: Any, layers: Sequence[Sequence[Any]], *, device: torch.device) -> None:
        """`layers` are the modules (PEFT's, or plain linears) of every group. Raises AdapterNotSupported."""
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        names = {id(value): name for name, value in trained.items()}
        self.groups: list[AdapterGroup] = []
        self.dropout = _dropout_of([one for modules in layers for one in modules if hasattr(one, "lora_A")])
        self._places: list[tuple[str, int, torch.Size]] = []
        parameters: list[torch.nn.Parameter] = []
        size = 0

        def lay(parameter: torch.nn.Parameter) -> int:
            nonlocal size
            start = size
            self._places.append((names.pop(id(parameter)), start, parameter.shape))
            parameters.append(parameter)
            size += parameter.numel()
            return start

        for modules in layers:
            covered = [module for module in modules if hasattr(module, "lora_A")]
            starts_a = [lay(_check(module).lora_A[_NAME].weight) for module in covered]
            starts_b = [lay(module.lora_B[_NAME].weight) for module in covered]
            self.groups.append(_make_group(modules, covered, starts_a, starts_b))
        if names:
            raise AdapterNotSupported(f"{', '.join(sorted(names.values())[:3])} are trained, which this path does not")
        flat = torch.empty(size, device=device, dtype=torch.float32)
        for parameter, (_, start, shape) in zip(parameters, self._places, strict=True):
            place = flat[start : start + shape.numel()].view(shape)
            place.copy_(parameter.data)
            parameter.data = place
        self.parameter = torch.nn.Parameter(flat)
        order = {name: number for number, name in enumerate(trained)}
        # In the order of the model's own parameters: an optimizer's state names them by their number.
        self._places.sort(key=lambda place: order[place[0]])

    @property
    def num_tensors(self) -> int:
        return len(self._places)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """A buffer laid out as the parameters are, as one view a parameter in the order of the model's own."""
        return [flat[start : start + shape.numel()].view(shape) for _, start, shape in self._places]


def _check(module: Any) -> Any:
    if list(module.lora_A) != [_NAME] or module.lora_B[_NAME].bias is not None or _NAME in module.lora_variant:
        raise AdapterNotSupported("an adapter has another form than plain LoRA")
    return module


def _dropout_of(modules: Sequence[Any]) -> float:
    """The probability that all adapters drop with. Raises AdapterNotSupported where they differ."""
    found = {float(getattr(module.lora_dropout[_NAME], "p", 0.0)) for module in modules}
    if len(found) > 1:
        raise AdapterNotSupported("adapters differ in dropout")
    return found.pop() if found else 0.0


def _make_group(
    modules: Sequence[Any], covered: Sequence[Any], starts_a: Sequence[int], starts_b: Sequence[int]
) -> AdapterGroup:
    ranks = {module.r[_NAME] for module in covered}
    scalings = {module.scaling[_NAME] for module in covered}
    if len(ranks) > 1 or len(scalings) > 1:
        raise AdapterNotSupported("adapters of layers that read the same rows differ in rank or scaling")
    rank = ranks.pop() if ranks else 0
    parts: list[_Part] = []
    first_row = 0
    for module in modules:
        if module in covered:
            number = len(parts)
            parts.append(
                _Part(
                    start_a=starts_a[number],
                    start_b=starts_b[number],
                    first_rank=number * rank,
                    first_row=first_row,
                    num_rows=module.out_features,
                )
            )
        first_row += module.out_features
    return AdapterGroup(
        rank=rank,
        in_features=modules[0].in_features,
        num_rows=first_row,
        scaling=scalings.pop() if scalings else 1.0,
        parts=parts,
    )


def plain(module: Any) -> Any:
    """The linear layer below a PEFT layer, or the layer itself."""
    return module.base_layer if hasattr(module, "lora_A") else module
