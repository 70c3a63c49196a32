"""What a step keeps on the device on the fast path, beside weights and optimizer. By arithmetic on what
`engine.fast_path` allocates; counterpart of `memory_activations` for the plain path. All sizes are in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_service.domain.memory_activations import StepShape, attention_sizes
from gpu_service.domain.memory_passes import LargestPasses, PassShape
from gpu_service.domain.recomputation import FEED_FORWARD, FULL, NONE, place_bytes, slice_rows

_FLOAT32, _INT64 = 4, 8
# Of a target: its place, label and sequence, what it costs and counts.
_COUNTED_BYTES = 5 * _INT64 + 4 * _FLOAT32
# Margins of the adapters' groups are as wide as this or a multiple of it.
_ROOM_COLUMNS = 64
# Rows in 8 bits have so many columns for each rank before them, and are a multiple of so many bytes long.
_RANK_TERMS, _ROUNDED_COLUMNS = 3, 128
_WORKSPACE_BYTES = 2 * 32 * 1024**2
# FlashAttention's float32 gradient of queries has so many rows more for each sequence.
_SPARE_ROWS = 128
# Sequences of a pass, for each that were as long as its longest: nobody counted them, and little depends on it.
_SEQUENCES = 2
_QUERY_KEY_NORMS = frozenset({"qwen3"})
# Of the kernel for adapters of layers side by side: columns of a slab by padded rank, programs of a launch, and the
# least tokens that one goes through. A single layer, and wider ranks, need no tables.
_SLAB_COLUMNS = {16: 128, 32: 128}
_PROGRAMS, _RUN_TOKENS = 528, 32
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Columns of a token's row in a block. `rooms` are the margins of its four groups of layers, `ranks` what
    of them is an adapter's.
    """

    hidden: int
    inner: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    rooms: tuple[int, int, int, int]
    ranks: tuple[int, int, int, int]
    has_head_norms: bool

    @property
    def placed(self) -> int:
        """Queries, keys and values side by side."""
        return self.queries + 2 * self.keys

    @property
    def kept(self) -> int:
        """What a block keeps for its backward pass, in the compute type."""
        _, _, into_mlp, out_of_mlp = self.rooms
        mlp = self.hidden + into_mlp + 2 * self.inner + into_mlp + self.inner + out_of_mlp
        return self.attended + self.hidden + mlp

    @property
    def attended(self) -> int:
        """Of it, the attention half's, with the block's input."""
        into_attention, out_of_attention, _, _ = self.rooms
        attention = self.hidden + into_attention + self.placed * (2 if self.has_head_norms else 1)
        return self.hidden + attention + self.queries + out_of_attention

    @property
    def kept_floats(self) -> int:
        """The same as `kept`, in float32: scales of norms, and attention's sums."""
        return 2 + self.heads + (self.heads + self.key_heads if self.has_head_norms else 0)

    def in_8_bits(self, columns: int, group: int) -> int:
        """Bytes of a row of `columns` in 8 bits, with its ranks and its scale."""
        ranks = _RANK_TERMS * self.ranks[group]
        return _FLOAT32 + (-(-(columns + ranks) // _ROUNDED_COLUMNS) * _ROUNDED_COLUMNS if ranks else columns)

    def left_out(self, level: str) -> int:
        """Columns of `kept` that are made again at this level; not of whole blocks."""
        if level == NONE:
            return 0
        into_attention, _, into_mlp, out_of_mlp = self.rooms
        columns = 2 * self.hidden + into_attention + into_mlp + self.inner + out_of_mlp
        return columns + (2 * self.inner + into_mlp if level == FEED_FORWARD else 0)


def peak_beside_state(shape: StepShape, passes: LargestPasses) -> int:
    """Most bytes at any moment of a step beside weights, adapter and optimizer; gradients are in it."""
    sizes = _sizes(shape)
    if shape.precision.trains_base:
        # One buffer of all gradients from the start.
        before, own, peaks = shape.gradient_bytes, 0, [shape.gradient_bytes]
    else:
        trained = _FLOAT32 * shape.num_trainable_parameters
        # A pass' gradient in the compute type, then the same in float32, beside that of the passes before.
        before = trained if passes.accumulates else 0
        own = shape.precision.compute_bytes * shape.num_trainable_parameters
        peaks = [before + own + trained]
    levels = shape.recomputation.levels(shape.base.num_layers)
    for one in passes.shapes:
        saved = [_saved(shape, sizes, one, level) for level in levels]
        peaks += _head_moments(shape, sizes, one, _standing_of(shape, saved, one, on_their_way=2) + before)
        of_head = 2 * one.targets * sizes.hidden * shape.precision.compute_bytes if shape.goes_back_twice else 0
        peaks += _block_moments(shape, sizes, one, saved, levels, before + own + of_head)
    for one in passes.evaluated:
        stream = one.tokens * sizes.hidden * shape.precision.compute_bytes
        peaks.append(max(_forward(shape, sizes, one), 2 * stream + _head_forward(shape, sizes, one)))
    longest = max((one.longest for one in (*passes.shapes, *passes.evaluated)), default=0)
    peak = max(peaks) + _standing(shape, sizes) + _tables(sizes, longest)
    return peak + (_WORKSPACE_BYTES if shape.device_type == "cuda" else 0)


def host_bytes(shape: StepShape, passes: LargestPasses) -> int:
    """Memory of the host that inputs of recomputed layers wait in; 0 on a CPU, where it is the device's own."""
    if not shape.recomputation.offload or shape.device_type == "cpu":
        return 0
    row = shape.base.hidden_size * shape.precision.compute_bytes
    on_shelf = min(shape.recomputation.full_layers, shape.base.num_layers)
    return on_shelf * max((place_bytes(one.tokens * row) for one in passes.shapes), default=0)


def _sizes(shape: StepShape) -> _Sizes:
    base = shape.base
    heads, queries, keys = attention_sizes(base)
    leaves = {layer.leaf for layer in shape.covered}
    ranks = [shape.rank * sum(leaf in leaves for leaf in group) for group in _GROUPS]
    rooms = [-(-width // _ROOM_COLUMNS) * _ROOM_COLUMNS for width in ranks]
    return _Sizes(
        hidden=base.hidden_size,
        inner=base.intermediate_size,
        heads=heads,
        key_heads=heads * keys // queries,
        queries=queries,
        keys=keys,
        rooms=(rooms[0], rooms[1], rooms[2], rooms[3]),
        ranks=(ranks[0], ranks[1], ranks[2], ranks[3]),
        has_head_norms=base.config_type in _QUERY_KEY_NORMS,
    )


def _whole(shape: StepShape, sizes: _Sizes, one: PassShape) -> int:
    """Everything that a block can keep."""
    return one.tokens * (sizes.kept * shape.precision.compute_bytes + _FLOAT32 * sizes.kept_floats)


def _saved(shape: StepShape, sizes: _Sizes, one: PassShape, level: str) -> int:
    """What a block keeps at this level, on the device or not."""
    compute = shape.precision.compute_bytes
    if level == FULL:
        return one.tokens * sizes.hidden * compute
    return _whole(shape, sizes, one) - one.tokens * compute * sizes.left_out(level)


def _standing_of(shape: StepShape, saved: Sequence[int], one: PassShape, *, on_their_way: int) -> int:
    """What these blocks keep; of those on the host's shelf so many are here. A CPU's shelf is its own memory."""
    if not shape.recomputation.offload or shape.device_type == "cpu":
        return sum(saved)
    on_shelf = min(shape.recomputation.full_layers, len(saved))
    stream = one.tokens * shape.base.hidden_size * shape.precision.compute_bytes
    return sum(saved[on_shelf:]) + min(on_shelf, on_their_way) * stream


def _block_moments(
    shape: StepShape, sizes: _Sizes, one: PassShape, saved: Sequence[int], levels: Sequence[str], gradients: int
) -> list[int]:
    """In each block's backward pass: what earlier blocks keep, and all of this one."""
    compute = shape.precision.compute_bytes
    residual = one.tokens * compute * (sizes.hidden + max(sizes.rooms[1], sizes.rooms[3]))
    plain = _whole(shape, sizes, one) + _working(shape, sizes, one)
    is_sliced = shape.recomputation.feed_forward_slices > 1
    in_slices = _sliced_backward(shape, sizes, one) if is_sliced else plain
    moments = []
    for number, level in enumerate(levels):
        working = in_slices if level == FULL else plain
        earlier = _standing_of(shape, saved[:number], one, on_their_way=1)
        moments.append(gradients + residual + working + earlier)
        if is_sliced and level == FULL:
            earlier = _standing_of(shape, saved[:number], one, on_their_way=2)
            moments.append(_sliced_forward(shape, sizes, one) + earlier)
    return moments


def _working(shape: StepShape, sizes: _Sizes, one: PassShape) -> int:
    """Most that a block's backward pass takes beside all that the block keeps, which it lets go of as it goes.

    Where what feeds the down projection gets its gradient; where gates and ups do; and in attention, where
    FlashAttention's gradients of keys and values have every query's head first, if keys are shared, and those of
    queries are float32 first. A block that is recomputed whole has made all of it just before.
    """
    compute, (_, _, into_mlp, out_of_mlp) = shape.precision.compute_bytes, sizes.rooms
    down = sizes.inner * one.tokens * compute
    down += one.tokens * sizes.in_8_bits(sizes.hidden, 3) if shape.rounds_rows else 0
    gates = (sizes.hidden - out_of_mlp) * one.tokens * compute
    tables = _adapter_tables(shape, one, ("gate_proj", "up_proj"), sizes.inner)
    # Tables go before gradients in 8 bits come.
    gates += max(tables, one.tokens * sizes.in_8_bits(2 * sizes.inner, 2) if shape.rounds_rows else 0)
    # Where no gradient is kept, the one of gates and ups, which is made whole, is twice the down projection's; that is
    # among the gradients.
    gates += compute * sizes.inner * sizes.hidden if shape.goes_back_twice else 0
    let_go = 3 * sizes.inner + 2 * sizes.hidden + 2 * into_mlp + out_of_mlp
    attention = sizes.queries + sizes.placed - let_go
    return max(down, gates, attention * one.tokens * compute + _attention_backward(shape, sizes, one))


def _attention_backward(shape: StepShape, sizes: _Sizes, one: PassShape) -> int:
    """What attention's backward pass takes for itself, or the gradient of what was rotated into its heads."""
    compute = shape.precision.compute_bytes
    shared = 2 * sizes.queries if sizes.keys != sizes.queries else 0
    floats = _FLOAT32 * (sizes.queries + sizes.heads)
    num_sequences = 1 if one.tokens <= one.longest else _SEQUENCES * -(-one.tokens // max(one.longest, 1))
    inside = one.tokens * compute * shared + (one.tokens + num_sequences * _SPARE_ROWS) * floats
    after = one.tokens * compute * (sizes.placed + sizes.rooms[0])
    after += one.tokens * sizes.in_8_bits(sizes.placed, 0) if shape.rounds_rows else 0
    return max(inside, after)


def _sliced_backward(shape: StepShape, sizes: _Sizes, one: PassShape) -> int:
    """All that a block takes that is made again with its feed-forward half in slices: where attention is made again,
    in a slice, and in attention's backward pass.
    """
    compute, (into_attention, out_of_attention, into_mlp, out_of_mlp) = shape.precision.compute_bytes, sizes.rooms
    # Its normed rows are let go of, and made once more in the end.
    normed = one.tokens * compute * (sizes.hidden + into_attention)
    attended = one.tokens * (compute * sizes.attended + _FLOAT32 * (sizes.kept_floats - 1)) - normed
    part = one._replace(tokens=min(slice_rows(one.tokens, shape.recomputation.feed_forward_slices), one.tokens))
    made = 2 * sizes.hidden + 3 * sizes.inner + 2 * into_mlp + out_of_mlp
    down = part.tokens * (compute * (made + sizes.inner) + _FLOAT32)
    gates = part.tokens * (compute * (made - out_of_mlp + sizes.hidden) + _FLOAT32)
    tables = _adapter_tables(shape, part, ("gate_proj", "up_proj"), sizes.inner)
    # As in `_working`.
    gates += max(tables, part.tokens * sizes.in_8_bits(2 * sizes.inner, 2) if shape.rounds_rows else 0)
    down += part.tokens * sizes.in_8_bits(sizes.hidden, 3) if shape.rounds_rows else 0
    added = one.tokens * compute * sizes.hidden
    sums = (
        _FLOAT32
        * shape.rank
        * sum(
            layer.in_features + layer.out_features
            for layer in shape.covered
            if layer.leaf in (*_GROUPS[2], *_GROUPS[3])
        )
        // max(shape.base.num_layers, 1)
    )
    moments = (
        normed + added + one.tokens * compute * (sizes.queries + out_of_attention),
        added + sums + _held(shape, sizes) + max(down, gates),
        one.tokens * compute * (sizes.queries + sizes.placed) + _attention_backward(shape, sizes, one),
        normed + one.tokens * compute * (sizes.placed + into_attention + sizes.hidden),
    )
    return attended + max(moments)


def _sliced_forward(shape: StepShape, sizes: _Sizes, one: PassShape) -> int:
    """The same in the forward pass, with both parts of the block's input: where attention adds, and in a slice."""
    compute, (_, out_of_attention, into_mlp, out_of_mlp) = shape.precision.compute_bytes, sizes.rooms
    attending = sizes.attended + 3 * sizes.hidden + sizes.queries + out_of_attention
    attention = one.tokens * (compute * attending + _FLOAT32 * (sizes.kept_floats - 1))
    rows = min(slice_rows(one.tokens, shape.recomputation.feed_forward_slices), one.tokens)
    part = rows * compute * (3 * sizes.inner + into_mlp + out_of_mlp)
    part += rows * sizes.in_8_bits(sizes.inner, 3) if shape.rounds_rows else 0
    return max(attention, one.tokens * compute * (6 * sizes.hidden + into_mlp) + part + _held(shape, sizes))


def _adapter_tables(shape: StepShape, one: PassShape, leaves: Sequence[str], rows: int) -> int:
    """Partial sums of the gradients of these layers' adapters, of `rows` each: of the inner rows by slabs of columns,
    and of B by runs of tokens.
    """
    block = max(16, 1 << max(shape.rank - 1, 0).bit_length())
    covered = {layer.leaf for layer in shape.covered}.intersection(leaves)
    if block not in _SLAB_COLUMNS or len(covered) < 2:
        return 0
    columns = _SLAB_COLUMNS[block]
    across = -(-rows // columns)
    splits = max(1, min(_PROGRAMS // across, -(-one.tokens // _RUN_TOKENS)))
    return _FLOAT32 * block * across * len(covered) * (one.tokens + splits * columns)


def _forward(shape: StepShape, sizes: _Sizes, one: PassShape) -> int:
    """In a block's forward pass: both parts of its input, what it may keep, and what it adds."""
    recomputation = shape.recomputation
    if recomputation.feed_forward_slices > 1 and recomputation.full_layers >= shape.base.num_layers:
        return _sliced_forward(shape, sizes, one)
    columns = 3 * sizes.hidden
    rounded = one.tokens * sizes.in_8_bits(sizes.inner, 3) if shape.rounds_rows else 0
    return _whole(shape, sizes, one) + one.tokens * columns * shape.precision.compute_bytes + rounded


def _head_moments(shape: StepShape, sizes: _Sizes, one: PassShape, standing: int) -> list[int]:
    """With a chunk of logits, and where the gradient of the last block's output is made."""
    compute = shape.precision.compute_bytes
    stream = one.tokens * sizes.hidden * compute
    own = 0 if shape.recomputation.levels(shape.base.num_layers)[-1] != FULL else stream
    rows = one.targets * sizes.hidden * compute
    residual = stream + one.tokens * compute * max(sizes.rooms[1], sizes.rooms[3])
    if shape.precision.trains_base:
        # Where a pass may not be a step's only one, logits are made once more, beside the gradient of their rows.
        again = shape.goes_back_twice or shape.gradient_bytes > compute * shape.num_trainable_parameters
        chunk = (
            min(one.targets, shape.recomputation.head_rows) * (shape.base.vocabulary_size + 3 * sizes.hidden) * compute
        )
        return [
            standing + stream + own + _head_forward(shape, sizes, one),
            standing + residual + (3 * rows + chunk if again else 4 * rows) + one.targets * _COUNTED_BYTES,
        ]
    return [
        standing + stream + own + _head_forward(shape, sizes, one),
        standing + residual + 4 * rows + compute * shape.num_trainable_parameters,
    ]


def _head_forward(shape: StepShape, sizes: _Sizes, one: PassShape) -> int:
    """Rows with a target, their sums, norms and gradients, and one chunk of logits."""
    compute = shape.precision.compute_bytes
    rows = one.targets * (4 * sizes.hidden * compute + 2 * _FLOAT32 + 5 * _INT64)
    return rows + min(one.targets, shape.recomputation.head_rows) * shape.base.vocabulary_size * compute


def _standing(shape: StepShape, sizes: _Sizes) -> int:
    """Margins beside the weights, and where one group's quantized weights are restored."""
    compute, sides, wide = shape.precision.compute_bytes, _sides(sizes), _wide(sizes)
    margins = sum(room * (rows + columns) for room, (rows, columns) in zip(sizes.rooms, sides, strict=True))
    if shape.rounds_rows:
        # Of either direction what stands beside its weights.
        beside = sum(
            rows * (sizes.in_8_bits(columns, group) - columns) + columns * (sizes.in_8_bits(rows, group) - rows)
            for group, (rows, columns) in enumerate(sides)
        )
        return shape.base.num_layers * (compute * margins + beside)
    if not _restores(shape):
        # The weights themselves stand in the wide matrices, and are counted as weights.
        return compute * shape.base.num_layers * (sum(wide) - sum(rows * columns for rows, columns in sides))
    recomputation = shape.recomputation
    if recomputation.feed_forward_slices > 1 and recomputation.full_layers >= shape.base.num_layers:
        # Those of the feed-forward half have memory of their own, for a time.
        wide = wide[:2]
    return compute * (shape.base.num_layers * margins + max(wide))


def _held(shape: StepShape, sizes: _Sizes) -> int:
    """Quantized weights of a block's feed-forward half, restored once for all of its slices."""
    return shape.precision.compute_bytes * sum(_wide(sizes)[2:]) if _restores(shape) else 0


def _restores(shape: StepShape) -> bool:
    """Whether weights are restored at each use."""
    return shape.precision.is_quantized and not (shape.keeps_weights or shape.rounds_rows)


def _sides(sizes: _Sizes) -> Sequence[tuple[int, int]]:
    """Rows and columns of the four groups' weights in a block."""
    return (
        (sizes.placed, sizes.hidden),
        (sizes.hidden, sizes.queries),
        (2 * sizes.inner, sizes.hidden),
        (sizes.hidden, sizes.inner),
    )


def _wide(sizes: _Sizes) -> Sequence[int]:
    """Numbers of each of the four with its margins."""
    return [(rows + room) * (columns + room) for room, (rows, columns) in zip(sizes.rooms, _sides(sizes), strict=True)]


def _tables(sizes: _Sizes, longest: int) -> int:
    """Cosines and sines of every position, a power of two of them."""
    positions = 1 << max(longest - 1, 0).bit_length()
    return positions * _FLOAT32 * (sizes.queries // sizes.heads)
