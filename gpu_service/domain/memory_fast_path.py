"""What a step keeps on the device on the fast path, beside weights and optimizer. By arithmetic on what
`engine.fast_path` allocates; counterpart of `memory_activations` for the plain path. All sizes are in bytes.
"""

from gpu_service.domain.memory_activations import StepShape, attention_sizes
from gpu_service.domain.memory_passes import LargestPasses, PassShape

_FLOAT32 = 4
# Margins of the adapters' groups are as wide as this or a multiple of it.
_ROOM_COLUMNS = 64
# Rows of the head's logits that exist at a time.
_CHUNK_ROWS = 2048
_WORKSPACE_BYTES = 2 * 32 * 1024**2
_QUERY_KEY_NORMS = frozenset({"qwen3"})
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def peak_beside_state(shape: StepShape, passes: LargestPasses) -> int:
    """Most bytes at any moment of a step beside weights, adapter and optimizer state; gradients are in it."""
    compute, trained = shape.precision.compute_bytes, _FLOAT32 * shape.num_trainable_parameters
    peaks = [trained]
    for one in passes.shapes:
        # The pass' own gradient in both types beside that of the passes before.
        gradients = (trained if passes.accumulates else 0) + trained + compute * shape.num_trainable_parameters
        stream = one.tokens * shape.base.hidden_size * compute
        saved = shape.base.num_layers * (2 * stream if shape.recomputes else _layer(shape, one)) + 2 * stream
        recomputed = _layer(shape, one) if shape.recomputes else 0
        peaks += [saved + _head(shape, one), saved + gradients + recomputed + _working(shape, one)]
    for one in passes.evaluated:
        stream = one.tokens * shape.base.hidden_size * compute
        peaks.append(4 * stream + max(_layer(shape, one), _head(shape, one)))
    return max(peaks) + _standing(shape) + (_WORKSPACE_BYTES if shape.device_type == "cuda" else 0)


def _rooms(shape: StepShape) -> list[int]:
    """Columns of each group's margin."""
    leaves = {layer.leaf for layer in shape.covered}
    covered = [sum(leaf in leaves for leaf in group) for group in _GROUPS]
    return [-(-shape.rank * count // _ROOM_COLUMNS) * _ROOM_COLUMNS for count in covered]


def _layer(shape: StepShape, one: PassShape) -> int:
    """What a block keeps for its backward pass."""
    base = shape.base
    heads, queries, keys = attention_sizes(base)
    into_attention, out_of_attention, into_mlp, out_of_mlp = _rooms(shape)
    placed = queries + 2 * keys
    columns = 4 * base.hidden_size + queries + 3 * base.intermediate_size
    columns += placed * (2 if base.config_type in _QUERY_KEY_NORMS else 1)
    columns += into_attention + out_of_attention + 2 * into_mlp + out_of_mlp
    return one.tokens * (columns * shape.precision.compute_bytes + _FLOAT32 * (heads + 2))


def _head(shape: StepShape, one: PassShape) -> int:
    """Rows with a target, their norm and its gradient, and one chunk of logits."""
    compute = shape.precision.compute_bytes
    rows = 6 * one.targets * shape.base.hidden_size * compute
    return rows + min(one.targets, _CHUNK_ROWS) * shape.base.vocabulary_size * compute


def _working(shape: StepShape, one: PassShape) -> int:
    """Gradients within a block: the residual stream's, and the larger of what attention and feed-forward part take."""
    base, compute = shape.base, shape.precision.compute_bytes
    _, queries, keys = attention_sizes(base)
    # FlashAttention's gradients of keys and values have every query's head, and that of the queries a float32 copy.
    attention = compute * (5 * queries + 4 * keys) + _FLOAT32 * queries
    return one.tokens * (compute * 3 * base.hidden_size + max(attention, compute * base.intermediate_size))


def _standing(shape: StepShape) -> int:
    """Margins beside the weights, and where one group's quantized weights are restored."""
    base, compute = shape.base, shape.precision.compute_bytes
    _, queries, keys = attention_sizes(base)
    hidden, inner = base.hidden_size, base.intermediate_size
    sizes = ((queries + 2 * keys, hidden), (hidden, queries), (2 * inner, hidden), (hidden, inner))
    rooms = _rooms(shape)
    margins = sum(room * (rows + columns) for room, (rows, columns) in zip(rooms, sizes, strict=True))
    scratch = max((rows + room) * (columns + room) for room, (rows, columns) in zip(rooms, sizes, strict=True))
    return compute * (base.num_layers * margins + (scratch if shape.precision.is_quantized else 0))
