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
from gpu_service.engine.fast_path.fp8 import Rounded, RoundedGroup
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

    def forward_rows(self, rows: torch.Tensor, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None: ...

    def place_gated(self, gate_up: torch.Tensor, x: torch.Tensor, *, adapted: bool) -> None: ...

    def forward_gated(self, gate_up: torch.Tensor, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None: ...

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
        if isinstance(self.frozen, RoundedGroup):
            self._forward_rounded(self.frozen, *self.split(x), out, adapted=adapted)
            return
        if adapted:
            self.fill_margin(x)
        self.multiply(x, out, adapted=adapted)

    def _forward_rounded(
        self, frozen: RoundedGroup, rows: torch.Tensor, margin: torch.Tensor, out: torch.Tensor, *, adapted: bool
    ) -> None:
        if not (adapted and self.room):
            rounded = frozen.round(rows, None)
        elif self.dropout.is_active:
            self._fill(rows, margin)
            rounded = frozen.round(rows, margin)
        else:
            rounded = frozen.fill_and_round(rows, margin)
        frozen.multiply(rounded, out[:, : frozen.num_rows])

    def fill_margin(self, x: torch.Tensor) -> None:
        """x A' beside the rows, in the margin of `x` [T, K + room]; of dropped rows where there is dropout."""
        if self.room:
            self._fill(*self.split(x))

    def _fill(self, rows: torch.Tensor, margin: torch.Tensor) -> None:
        if self.dropout.is_active:
            self.dropout.kernels.drop_and_rank(rows, self.frozen.margins.below, margin, **self._masks())
        elif isinstance(self.frozen, RoundedGroup):
            self.frozen.fill_ranks(rows, margin)
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

    def forward_rows(self, rows: torch.Tensor, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`forward` of `rows` [T, K] that lie elsewhere: of `x` [T, K + room] its margin alone is what it says."""
        if isinstance(self.frozen, RoundedGroup):
            self._forward_rounded(self.frozen, rows, self.split(x)[1], out, adapted=adapted)
            return
        x[:, : self.frozen.in_features].copy_(rows)
        self.forward(x, out, adapted=adapted)

    def place_gated(self, gate_up: torch.Tensor, x: torch.Tensor, *, adapted: bool) -> None:
        """silu(gate) * up of `gate_up` [T, 2 * K] become the first K columns of `x`, and x A' its margin."""
        self.operations.gate(gate_up, x[:, : self.frozen.in_features])
        if adapted:
            self.fill_margin(x)

    def forward_gated(self, gate_up: torch.Tensor, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`place_gated`, and `multiply`; in 8 bits in another order, and with other last bits."""
        frozen = self.frozen
        if isinstance(frozen, RoundedGroup) and adapted and self.room and not self.dropout.is_active:
            rounded = frozen.gate_and_round(gate_up, *self.split(x))
            frozen.multiply(rounded, out[:, : frozen.num_rows])
            return
        self.operations.gate(gate_up, x[:, : self.frozen.in_features])
        self.forward(x, out, adapted=adapted)

    def multiply(self, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`forward` of an `x` whose margin is filled."""
        frozen, adapted = self.frozen, adapted and self.room > 0
        if isinstance(frozen, RoundedGroup):
            rows, margin = self.split(x)
            frozen.multiply(frozen.round(rows, margin if adapted else None), out[:, : frozen.num_rows])
        else:
            frozen.multiply(x, out[:, : frozen.num_rows], adapted=adapted)

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
        frozen = self.frozen
        of_output, inner = gradient[:, : frozen.num_rows], gradient[:, frozen.num_rows :]
        if not self.room:
            if of_gated is not None:
                self.operations.gate_backward_(of_gated, of_output)
            if out is not None:
                self._multiply_back(gradient, out, adapted=False)
            return
        # Of a single adapter: one read of the gradient makes its ranks' and rounds it.
        rounded: Rounded | None = None
        alone = len(self.adapter.parts) == 1 and of_gated is None and not self.dropout.is_active
        if isinstance(frozen, RoundedGroup) and alone and out is not None:
            rounded = frozen.fill_and_round_back(of_output, inner)
            self.operations.weigh_b(of_output, ranks, self._ranks, gradients)
        else:
            self._back_through_b(of_output, ranks, inner, gradients, of_gated)
        all_a = self.adapter.view_all_a(gradients)
        if self.dropout.is_active:
            self.dropout.kernels.drop_and_weigh(inner, rows, all_a, **self._masks())
            if out is not None:
                # The masks stand between the ranks' gradient and the rows': it is no part of the product.
                self._multiply_back(gradient, out, adapted=False)
                self.dropout.kernels.drop_and_add(inner, frozen.margins.below, out, **self._masks())
            return
        torch.mm(inner[:, : all_a.shape[0]].t(), rows, out=all_a)
        if isinstance(frozen, RoundedGroup) and rounded is not None and out is not None:
            frozen.multiply_back(rounded, out)
        elif out is not None:
            self._multiply_back(gradient, out, adapted=True)

    def _back_through_b(
        self,
        of_output: torch.Tensor,
        ranks: torch.Tensor,
        inner: torch.Tensor,
        gradients: torch.Tensor,
        of_gated: torch.Tensor | None,
    ) -> None:
        """`inner` becomes the ranks' gradient, and every B's is made; first that of gates and ups, where they are."""
        right, prepared = self.frozen.margins.right, self._ranks
        # In float32 its tiles are more than a multiprocessor holds.
        if of_gated is not None and prepared.takes_gates and of_output.dtype is not torch.float32:
            self.operations.gate_adapter_backward_(of_gated, of_output, right, ranks, inner, prepared, gradients)
            return
        if of_gated is not None:
            self.operations.gate_backward_(of_gated, of_output)
        self.operations.adapter_backward(of_output, right, ranks, inner, prepared, gradients)

    def _multiply_back(self, gradient: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        frozen = self.frozen
        if isinstance(frozen, RoundedGroup):
            of_output, inner = gradient[:, : frozen.num_rows], gradient[:, frozen.num_rows :]
            frozen.multiply_back(frozen.round_back(of_output, inner if adapted else None), out)
        else:
            frozen.multiply_back(gradient, out, adapted=adapted)
