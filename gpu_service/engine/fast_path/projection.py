"""Linear layers that read the same rows, with their adapters: one product forward, one backward, and the adapters' own.

Rows come in a buffer that is `room` columns wider than they are, and so do the gradients of what they became: the
adapter's part of the sum lies there. Nothing of the frozen weights has a gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from gpu_service.engine.fast_path.adapters import AdapterGroup
from gpu_service.engine.fast_path.dropout import LAYERS_PER_GROUP, Dropout
from gpu_service.engine.fast_path.fp8 import RoundedGroup
from gpu_service.engine.fast_path.frozen import FrozenGroup
from gpu_service.engine.fast_path.torch_reference import RankPart


class Linears(Protocol):
    """Layers that read the same rows, as a block uses them. `Projection` says what each method does."""

    @property
    def in_features(self) -> int: ...

    @property
    def room(self) -> int: ...

    def input_buffer(self, rows: int, like: torch.Tensor) -> torch.Tensor: ...

    def output_buffer(self, rows: int, like: torch.Tensor) -> torch.Tensor: ...

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(self, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None: ...

    def fill_margin(self, x: torch.Tensor) -> None: ...

    def place(self, rows: torch.Tensor, x: torch.Tensor, *, adapted: bool) -> None: ...

    def place_gated(self, gate_up: torch.Tensor, x: torch.Tensor, *, adapted: bool) -> None: ...

    def multiply(self, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None: ...

    def backward(
        self,
        gradient: torch.Tensor,
        rows: torch.Tensor,
        ranks: torch.Tensor,
        out: torch.Tensor | None,
        gradients: torch.Tensor,
        *,
        of_gated: torch.Tensor | None = None,
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Projection:
    """`in_features` K, `num_rows` N; `room` is 0 where no layer has an adapter."""

    frozen: FrozenGroup | RoundedGroup
    adapter: AdapterGroup
    # The module of kernels.
    operations: Any
    # Of what the adapters read; `number` tells this group's masks from those of others.
    dropout: Dropout
    number: int

    @property
    def in_features(self) -> int:
        return self.frozen.in_features

    @property
    def room(self) -> int:
        return self.adapter.room

    def input_buffer(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """An empty [T, K + room], whose first K columns are for the rows."""
        return like.new_empty((rows, self.frozen.in_features + self.room))

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An input buffer as its rows and its margin."""
        return x[:, : self.frozen.in_features], x[:, self.frozen.in_features :]

    def output_buffer(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """An empty [T, N + room], whose first N columns are the output, or its gradient."""
        return like.new_empty((rows, self.frozen.num_rows + self.room))

    def restored(self) -> AbstractContextManager[None]:
        """Inside, weights that are restored at each use are restored once."""
        return self.frozen.restored() if isinstance(self.frozen, FrozenGroup) else nullcontext()

    @cached_property
    def _ranks(self) -> Any:
        adapter = self.adapter
        return self.operations.prepare_ranks(
            [
                RankPart(
                    first_row=part.first_row, num_rows=part.num_rows, first_rank=part.first_rank, start_b=part.start_b
                )
                for part in adapter.parts
            ],
            rank=adapter.rank,
            room=adapter.room,
            scaling=adapter.scaling,
            device=self.frozen.margins.below.device,
        )

    def forward(self, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`out`'s first N columns become the layers' outputs. `x` [T, K + room] gets x A' in its margin."""
        if adapted:
            self.fill_margin(x)
        self.multiply(x, out, adapted=adapted)

    def fill_margin(self, x: torch.Tensor) -> None:
        """x A' beside the rows, in the margin of `x` [T, K + room]; of dropped rows where there is dropout."""
        if not self.room:
            return
        rows, margin = self.split(x)
        if self.dropout.is_active:
            self.dropout.kernels.drop_and_rank(rows, self.frozen.margins.below, margin, **self._masks())
        else:
            torch.mm(rows, self.frozen.margins.below.t(), out=margin)

    def _masks(self) -> dict[str, Any]:
        """What tells the kernels of dropout which masks are meant."""
        return {
            "key": self.dropout.key,
            "first_row": self.dropout.first_row,
            "first_layer": self.number * LAYERS_PER_GROUP,
            "num_layers": len(self.adapter.parts),
            "rank": self.adapter.rank,
            "probability": self.dropout.probability,
        }

    def place(self, rows: torch.Tensor, x: torch.Tensor, *, adapted: bool) -> None:
        """`rows` [T, K] become the first K columns of `x`, and x A' its margin."""
        x[:, : self.frozen.in_features].copy_(rows)
        if adapted:
            self.fill_margin(x)

    def place_gated(self, gate_up: torch.Tensor, x: torch.Tensor, *, adapted: bool) -> None:
        """silu(gate) * up of `gate_up` [T, 2 * K] become the first K columns of `x`, and x A' its margin."""
        self.operations.gate(gate_up, x[:, : self.frozen.in_features])
        if adapted:
            self.fill_margin(x)

    def multiply(self, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`forward` of an `x` whose margin is filled."""
        self.frozen.multiply(x, out[:, : self.frozen.num_rows], adapted=adapted and self.room > 0)

    def backward(
        self,
        gradient: torch.Tensor,
        rows: torch.Tensor,
        ranks: torch.Tensor,
        out: torch.Tensor | None,
        gradients: torch.Tensor,
        *,
        of_gated: torch.Tensor | None = None,
    ) -> None:
        """`out` [T, K] becomes the gradient of the rows; None: nobody wants it. `gradients` is a flat buffer.

        `gradient` [T, N + room] has that of the outputs in its first N columns. `rows` [T, K] and `ranks` [T, room] are
        what `forward` left in `x`. With `of_gated` [T, N / 2] the outputs are gates and ups, `gradient` holds them, and
        becomes their gradient, `of_gated` being that of what was made of them.
        """
        frozen, adapter = self.frozen, self.adapter
        of_output = gradient[:, : frozen.num_rows]
        if self.room:
            inner = gradient[:, frozen.num_rows :]
            right, prepared = frozen.margins.right, self._ranks
            # In float32 its tiles are more than a multiprocessor holds.
            if of_gated is not None and prepared.takes_gates and of_output.dtype is not torch.float32:
                self.operations.gate_adapter_backward_(of_gated, of_output, right, ranks, inner, prepared, gradients)
            else:
                if of_gated is not None:
                    self.operations.gate_backward_(of_gated, of_output)
                self.operations.adapter_backward(of_output, right, ranks, inner, prepared, gradients)
            all_a = adapter.view_all_a(gradients)
            if self.dropout.is_active:
                self.dropout.kernels.drop_and_weigh(inner, rows, all_a, **self._masks())
                if out is not None:
                    # The masks stand between the ranks' gradient and the rows': it is no part of the product.
                    frozen.multiply_back(gradient, out, adapted=False)
                    self.dropout.kernels.drop_and_add(inner, frozen.margins.below, out, **self._masks())
                return
            torch.mm(inner[:, : all_a.shape[0]].t(), rows, out=all_a)
        elif of_gated is not None:
            self.operations.gate_backward_(of_gated, of_output)
        if out is not None:
            frozen.multiply_back(gradient, out, adapted=self.room > 0)
