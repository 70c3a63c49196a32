"""One decoder block on flat tokens, forward and backward by hand. What the backward pass needs is kept, or made again.

The residual stream comes in two parts, what it was and what is to be added, so that adding and norming are one pass
over memory. Frozen norms have no gradient; where they are trained, a subclass makes it (`full_block`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.engine.fast_path.attention import Attention, Bounds
from gpu_service.engine.fast_path.projection import Linears

# The norms of a block.
FIRST, SECOND = 0, 1


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Rotary tables, float32 [positions, D / 2], and each token's place in them [T]."""

    cosines: torch.Tensor
    sines: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    heads: int
    key_value_heads: int
    head_dim: int
    epsilon: float

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.key_value_heads * self.head_dim


@dataclass(kw_only=True)
class Attended:
    """What the attention half of a block leaves for its backward pass."""

    residual: torch.Tensor
    scale: torch.Tensor
    # Which may be made again: None.
    normed: torch.Tensor | None
    # Before the norms of queries and keys, where the family has them; else None.
    unnormed: torch.Tensor | None
    head_scales: tuple[torch.Tensor, torch.Tensor] | None
    heads: torch.Tensor
    attended: torch.Tensor
    attention: Any
    attended_ranks: torch.Tensor


@dataclass(kw_only=True)
class Kept(Attended):
    """What a block's forward pass leaves for its backward pass, which lets go of it part by part."""

    middle: torch.Tensor
    middle_scale: torch.Tensor
    middle_normed: torch.Tensor
    gate_up: torch.Tensor
    gated: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Block:
    """The weights of one decoder layer. `query_norm` and `key_norm` are [D], or None."""

    shape: BlockShape
    operations: Any
    attention: Attention
    first_norm: torch.Tensor
    second_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    attention_in: Linears
    attention_out: Linears
    mlp_in: Linears
    mlp_out: Linears

    def forward(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None,
        positions: Positions,
        bounds: Bounds,
        *,
        adapted: bool,
        completes: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, Kept]:
        """Residual stream and what is to be added to it, both [T, H]; the same of the next block, and what is kept.

        Unless it `completes`, what would be added is not computed: the backward pass makes the rest of a block again.
        """
        ops, rows, hidden = self.operations, x.shape[0], x.shape[1]
        added, attended = self.attend(x, add, positions, bounds, adapted=adapted)
        middle_normed = self.mlp_in.input_buffer(rows, x)
        middle, middle_scale = ops.add_norm(
            attended.residual, added, self.second_norm, self.shape.epsilon, middle_normed[:, :hidden]
        )
        gate_up = self.mlp_in.output_buffer(rows, x)
        self.mlp_in.forward(middle_normed, gate_up, adapted=adapted)
        gated = self.mlp_out.input_buffer(rows, x)
        gates_and_ups = gate_up[:, : 2 * self.mlp_out.in_features]
        if completes:
            # Its memory is the attention's addition, which is spent.
            self.mlp_out.forward_gated(gates_and_ups, gated, added, adapted=adapted)
        else:
            self.mlp_out.place_gated(gates_and_ups, gated, adapted=adapted)
        kept = Kept(
            **vars(attended),
            middle=middle,
            middle_scale=middle_scale,
            middle_normed=middle_normed,
            gate_up=gate_up,
            gated=gated,
        )
        return middle, added, kept

    def attend(
        self, x: torch.Tensor, add: torch.Tensor | None, positions: Positions, bounds: Bounds, *, adapted: bool
    ) -> tuple[torch.Tensor, Attended]:
        """The block's attention half: what it adds to the residual stream [T, H], and what it keeps."""
        ops, shape, (rows, hidden) = self.operations, self.shape, x.shape
        normed = self.attention_in.input_buffer(rows, x)
        residual, scale = ops.add_norm(x, add, self.first_norm, shape.epsilon, normed[:, :hidden])
        projected = x.new_empty((rows, shape.query_width + 2 * shape.key_width))
        self.attention_in.forward(normed, projected, adapted=adapted)
        heads, unnormed, head_scales = self._place_heads(projected, positions)
        query, key, value = self._split(heads)
        attended, attention = self.attention.forward(query, key, value, bounds)
        wide = self.attention_out.input_buffer(rows, x)
        added = x.new_empty((rows, hidden))
        self.attention_out.forward_rows(attended.flatten(1), wide, added, adapted=adapted)
        return added, Attended(
            residual=residual,
            scale=scale,
            normed=normed,
            unnormed=unnormed,
            head_scales=head_scales,
            heads=heads,
            attended=attended,
            attention=attention,
            attended_ranks=wide[:, shape.query_width :].clone(),
        )

    def backward(
        self,
        residual: torch.Tensor,
        kept: Kept,
        positions: Positions,
        bounds: Bounds,
        gradients: torch.Tensor,
        *,
        reaches_input: bool,
    ) -> None:
        """Carry the gradient of the block's output through it.

        `residual` [T, H + room] has it in its first H columns and then that of the block's input, unless
        `reaches_input` is False: nobody wants it. `gradients` is the flat buffer of the trained weights'.
        `kept` is used up.
        """
        rows, hidden = kept.residual.shape
        of_gated = residual.new_empty((rows, self.mlp_out.in_features))
        out = residual[:, : hidden + self.mlp_out.room]
        self.mlp_out.backward(out, *self.mlp_out.split(kept.gated), of_gated, gradients)
        del kept.gated
        of_normed = residual.new_empty((rows, hidden))
        self.mlp_in.backward(
            kept.gate_up, *self.mlp_in.split(kept.middle_normed), of_normed, gradients, of_gated=of_gated
        )
        # Attention's backward pass needs room for gradients in more heads than there are.
        del kept.gate_up, kept.middle_normed, of_gated
        self.back_through_norm(SECOND, of_normed, kept.middle, kept.middle_scale, residual[:, :hidden])
        del kept.middle, kept.middle_scale, of_normed
        self.attend_backward(residual, kept, positions, bounds, gradients, reaches_input=reaches_input)

    def attend_backward(
        self,
        residual: torch.Tensor,
        kept: Attended,
        positions: Positions,
        bounds: Bounds,
        gradients: torch.Tensor,
        *,
        reaches_input: bool,
    ) -> None:
        """`backward` of the block's attention half."""
        shape = self.shape
        rows, hidden = kept.residual.shape
        of_attended = residual.new_empty((rows, shape.query_width))
        out = residual[:, : hidden + self.attention_out.room]
        self.attention_out.backward(out, kept.attended.flatten(1), kept.attended_ranks, of_attended, gradients)
        of_heads = self.attention.backward(
            of_attended.unflatten(1, (shape.heads, shape.head_dim)),
            *self._split(kept.heads),
            kept.attended,
            kept.attention,
            bounds,
        )
        of_projected = self._unplace_heads(of_heads, kept, positions)
        del of_heads, of_attended
        into = residual.new_empty((rows, hidden)) if reaches_input else None
        normed = kept.normed if kept.normed is not None else self.norm_input(FIRST, kept.residual)
        self.attention_in.backward(of_projected, *self.attention_in.split(normed), into, gradients)
        if into is not None:
            self.back_through_norm(FIRST, into, kept.residual, kept.scale, residual[:, :hidden])

    def norm_input(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """The normed rows of `x` [T, H] with the margin that the layers behind the norm read."""
        layers = (self.attention_in, self.mlp_in)[number]
        normed = layers.input_buffer(x.shape[0], x)
        weight = (self.first_norm, self.second_norm)[number]
        self.operations.add_norm(x, None, weight, self.shape.epsilon, normed[:, : x.shape[1]])
        layers.fill_margin(normed)
        return normed

    def back_through_norm(
        self, number: int, of_normed: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, stream: torch.Tensor
    ) -> None:
        """Add to `stream` what `of_normed`, the gradient of a norm's output, is before the norm."""
        weight = (self.first_norm, self.second_norm)[number]
        self.operations.norm_backward_(of_normed, x, weight, scale, stream, adds=True)

    def _back_through_head_norm(
        self, number: int, gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, *, heads: int
    ) -> None:
        """Put in the place of `gradient`, that of the normed queries (0) or keys (1), what it is before the norm."""
        weight = (self.query_norm, self.key_norm)[number]
        self.operations.head_norm_backward(gradient, x, weight, scale, gradient, heads=heads)

    def _split(self, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = self.shape
        query, key, value = heads.split([shape.query_width, shape.key_width, shape.key_width], dim=1)
        return (
            query.unflatten(1, (shape.heads, shape.head_dim)),
            key.unflatten(1, (shape.key_value_heads, shape.head_dim)),
            value.unflatten(1, (shape.key_value_heads, shape.head_dim)),
        )

    def _place_heads(
        self, projected: torch.Tensor, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]:
        """Norm the heads of queries and keys, where the family does, and rotate them."""
        ops, shape = self.operations, self.shape
        queries_and_keys = shape.query_width + shape.key_width
        heads, unnormed, scales = projected, None, None
        if self.query_norm is not None and self.key_norm is not None:
            heads, unnormed = torch.empty_like(projected), projected
            query, key = slice(0, shape.query_width), slice(shape.query_width, queries_and_keys)
            scales = (
                ops.head_norm(projected[:, query], self.query_norm, shape.epsilon, heads[:, query], heads=shape.heads),
                ops.head_norm(
                    projected[:, key], self.key_norm, shape.epsilon, heads[:, key], heads=shape.key_value_heads
                ),
            )
            heads[:, queries_and_keys:].copy_(projected[:, queries_and_keys:])
        placed = heads[:, :queries_and_keys]
        ops.rotate(
            placed,
            positions.cosines,
            positions.sines,
            positions.places,
            placed,
            heads=shape.heads + shape.key_value_heads,
            backward=False,
        )
        return heads, unnormed, scales

    def _unplace_heads(
        self, of_heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], kept: Attended, positions: Positions
    ) -> torch.Tensor:
        """The gradient [T, N + room] of what `_place_heads` was given."""
        ops, shape = self.operations, self.shape
        out = self.attention_in.output_buffer(kept.residual.shape[0], kept.residual)
        first = 0
        for number, heads in enumerate((shape.heads, shape.key_value_heads)):
            columns = slice(first, first + heads * shape.head_dim)
            first = columns.stop
            ops.rotate(
                of_heads[number].flatten(1),
                positions.cosines,
                positions.sines,
                positions.places,
                out[:, columns],
                heads=heads,
                backward=True,
            )
            if kept.head_scales is not None and kept.unnormed is not None:
                self._back_through_head_norm(
                    number, out[:, columns], kept.unnormed[:, columns], kept.head_scales[number], heads=heads
                )
        out[:, first : first + shape.key_width].copy_(of_heads[2].flatten(1))
        return out
