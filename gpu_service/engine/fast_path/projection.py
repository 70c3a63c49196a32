"""Linear layers that read the same rows, with their adapters: one product forward, one backward, and the adapters' own.

Rows come in a buffer that is `room` columns wider than they are, and so do the gradients of what they became: the
adapter's part of the sum lies there. Nothing of the frozen weights has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_service.engine.fast_path.adapters import AdapterGroup
from gpu_service.engine.fast_path.frozen import FrozenGroup


@dataclass(frozen=True, kw_only=True)
class Projection:
    """`in_features` K, `num_rows` N; `room` is 0 where no layer has an adapter."""

    frozen: FrozenGroup
    adapter: AdapterGroup

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

    def forward(self, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`out`'s first N columns become the layers' outputs. `x` [T, K + room] gets x A' in its margin."""
        frozen = self.frozen
        rows = x[:, : frozen.in_features]
        adapted = adapted and self.room > 0
        if adapted:
            torch.mm(rows, frozen.margins.below.t(), out=x[:, frozen.in_features :])
        matrix = frozen.forward_matrix(adapted=adapted).t()
        target = out[:, : frozen.num_rows]
        if frozen.bias is None:
            torch.mm(x if adapted else rows, matrix, out=target)
        else:
            torch.addmm(frozen.bias, x if adapted else rows, matrix, out=target)

    def backward(
        self,
        gradient: torch.Tensor,
        rows: torch.Tensor,
        ranks: torch.Tensor,
        out: torch.Tensor | None,
        gradients: torch.Tensor,
    ) -> None:
        """`out` [T, K] becomes the gradient of the rows; None: nobody wants it. `gradients` is a flat buffer.

        `gradient` [T, N + room] has that of the outputs in its first N columns. `rows` [T, K] and `ranks` [T, room] are
        what `forward` left in `x`.
        """
        frozen, adapter = self.frozen, self.adapter
        of_output = gradient[:, : frozen.num_rows]
        if self.room:
            inner = gradient[:, frozen.num_rows :]
            torch.mm(of_output, frozen.margins.right, out=inner)
            all_a = adapter.view_all_a(gradients)
            torch.mm(inner[:, : all_a.shape[0]].t(), rows, out=all_a)
            for part in adapter.parts:
                columns = of_output[:, part.first_row : part.first_row + part.num_rows]
                its_ranks = ranks[:, part.first_rank : part.first_rank + adapter.rank]
                target = adapter.view_b(gradients, part)
                torch.addmm(target, columns.t(), its_ranks, beta=0, alpha=adapter.scaling, out=target)
        if out is not None:
            torch.mm(gradient if self.room else of_output, frozen.backward_matrix(adapted=self.room > 0), out=out)
