"""What a step keeps on the device beside weights and optimizer: activations, logits, casts, temporaries. By arithmetic.

Follows what torch's autograd saves, and what transformers', PEFT's and bitsandbytes' layers make, on the plain path:
flat batches, causal attention sequence by sequence, logits only where a target follows, mixed precision by autocast.
Measures nothing. All sizes are in bytes; lower-case letters are those of docs/training.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gpu_service.catalog.base_models import BaseModel, LinearLayer
from gpu_service.domain.memory_passes import LargestPasses, PassShape
from gpu_service.domain.recomputation import NOTHING, Recomputation

_FLOAT32 = 4
# Log-probabilities in float32, their gradient and that of the logits stand together for a moment. Of preference pairs
# the reference's are gone by then.
_LOGITS_COPIES = 3
# Norms of a decoder layer over the hidden size; two where nothing is said.
_NORMS_PER_LAYER: Mapping[str, int] = {"gemma3_text": 4, "gemma3": 4}
_QUERY_KEY_NORMS = frozenset({"qwen3", "gemma3_text", "gemma3"})
# On a CPU. Blocks up to this come out of the C library's heap, which mends badly the holes that they leave: nearly all
# that a pass makes in its layers stands there once more, also where it is made again and gone again. (Measured with
# Debian 12's, glibc 2.36: `benchmarks/memory_cpu.json`.) Larger ones are mapped by themselves.
_HEAP_BLOCK_BYTES = 32 * 1024**2
_HEAP_HOLES = 0.8
# cuBLAS' workspaces on CUDA, taken from torch's allocator: one for the forward and one for the backward thread.
_WORKSPACE_BYTES = 2 * 32 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How the base is held and what products run in. `residual_bytes` is of a value between the layers."""

    compute_bytes: int
    residual_bytes: int
    trains_base: bool
    # A quantized layer gives its result in the type of its input.
    is_quantized: bool
    # bitsandbytes' 8-bit product keeps its input; its 4-bit product does not.
    keeps_inputs: bool

    @property
    def is_mixed(self) -> bool:
        return self.compute_bytes != _FLOAT32

    @property
    def inner_bytes(self) -> int:
        """Of a value within a layer's feed-forward part."""
        return self.residual_bytes if self.is_quantized else self.compute_bytes


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Everything of a run that its activations depend on. `covered` are the layers that get an adapter."""

    base: BaseModel
    precision: Precision
    covered: tuple[LinearLayer, ...]
    rank: int
    num_trainable_parameters: int
    recomputes: bool
    has_dropout: bool
    # Bytes that the optimizer's step takes for each trainable parameter, beside its state.
    step_bytes_per_parameter: int
    device_type: str
    # On the fast path: in place of `recomputes`, and whether quantized weights stand in the compute type as well.
    recomputation: Recomputation = NOTHING
    keeps_weights: bool = False
    # On the fast path: frozen products take rows that are rounded to 8 bits.
    rounds_rows: bool = False
    # On the fast path, of a base that is trained: its gradients, which stand there from the start.
    gradient_bytes: int = 0
    # There too: the backward pass is made twice, so that what the head kept stands through the first one.
    goes_back_twice: bool = False


def peak_beside_state(shape: StepShape, passes: LargestPasses) -> int:
    """Most bytes at any moment of a step beside weights, adapter and optimizer state; gradients are in it."""
    trained = _FLOAT32 * shape.num_trainable_parameters
    peaks = [trained + shape.step_bytes_per_parameter * shape.num_trainable_parameters]
    for one in passes.shapes:
        peaks += _pass_peaks(shape, one, trained, already_bytes=trained if passes.accumulates else 0)
    peaks += [_evaluation_peak(shape, one) for one in passes.evaluated]
    return max(peaks) + (_WORKSPACE_BYTES if shape.device_type == "cuda" else 0)


def _pass_peaks(shape: StepShape, one: PassShape, trained: int, *, already_bytes: int) -> list[int]:
    """Candidates for the highest moment of a pass: at the logits, in the backward pass' first layer, and at its end."""
    base, precision = shape.base, shape.precision
    layer = saved_by_layer(shape, one)
    kept = one.tokens * base.hidden_size * precision.residual_bytes if shape.recomputes else layer
    ends = one.tokens * base.hidden_size * (precision.residual_bytes + _FLOAT32 * (2 if precision.trains_base else 1))
    casts = _cast_bytes(shape)
    saved = base.num_layers * kept + ends + casts + one.tokens * _rotary_bytes(shape)
    head_input = one.targets * base.hidden_size * (_FLOAT32 + precision.compute_bytes)
    logits = one.targets * base.vocabulary_size * _FLOAT32 * _LOGITS_COPIES
    working = _working_bytes(shape, one)
    recomputed = layer if shape.recomputes else 0
    head = base.vocabulary_size * base.hidden_size
    head_gradient = _FLOAT32 * head if precision.trains_base else 0
    peaks = [
        already_bytes + saved + head_input + _head_cast_bytes(shape) + logits,
        max(already_bytes, head_gradient) + saved + recomputed + working,
    ]
    if precision.trains_base:
        # Embeddings that share the head's matrix get their gradient in a piece of its own, at the very end.
        peaks.append(trained + head_gradient + layer + working)
    return peaks


def _evaluation_peak(shape: StepShape, one: PassShape) -> int:
    """Without gradients there is the layer in hand, and at the end the logits with their log-probabilities."""
    base = shape.base
    stream = one.tokens * base.hidden_size * shape.precision.residual_bytes
    logits = one.targets * base.vocabulary_size * (2 * _FLOAT32 + shape.precision.compute_bytes)
    return 2 * stream + max(2 * _working_bytes(shape, one), logits + _head_cast_bytes(shape))


def saved_by_layer(shape: StepShape, one: PassShape) -> int:
    """What one decoder layer keeps for the backward pass."""
    base, precision = shape.base, shape.precision
    heads, queries, key_values = attention_sizes(base)
    covered = _first_layer(shape.covered if not precision.trains_base else base.linear_layers)
    compute = precision.compute_bytes
    per_token = len(covered) * shape.rank * compute if not precision.trains_base else 0
    if precision.is_mixed:
        # Every product casts its input anew, and keeps the cast for the gradient of its own weight.
        per_token += compute * sum(item.in_features for item in covered)
    else:
        # In float32 nothing is cast, and products that share an input share it here too.
        per_token += _FLOAT32 * (2 * base.hidden_size + queries + base.intermediate_size)
    if shape.has_dropout:
        # A byte for what was kept of each adapter's input.
        per_token += sum(item.in_features for item in covered)
    if precision.keeps_inputs:
        per_token += _FLOAT32 * (2 * base.hidden_size + base.intermediate_size)
    norms = _NORMS_PER_LAYER.get(base.config_type, 2)
    per_token += norms * (_FLOAT32 * base.hidden_size * (2 if precision.trains_base else 1) + _FLOAT32)
    if base.config_type in _QUERY_KEY_NORMS:
        per_token += 2 * _FLOAT32 * (queries + key_values)
    # Rotated queries and keys, values, and what attention gives with its log-sum. A CPU's kernel knows no shared keys.
    attended = queries if shape.device_type == "cpu" else key_values
    per_token += compute * (2 * queries + 2 * attended) + _FLOAT32 * heads
    # The gate, its activation, and what it is multiplied with.
    per_token += 3 * precision.inner_bytes * base.intermediate_size
    return one.tokens * per_token + _plain_attention_bytes(shape, one)


def heap_holes(shape: StepShape, passes: LargestPasses) -> int:
    """On a CPU, what the C library's heap has beside what is in use; 0 elsewhere."""
    if shape.device_type != "cpu":
        return 0
    return round(_HEAP_HOLES * shape.base.num_layers * max((_in_heap(shape, one) for one in passes.shapes), default=0))


def _in_heap(shape: StepShape, one: PassShape) -> int:
    """Of what a layer makes, all but blocks that are too large for a heap: the feed-forward part's are the largest."""
    base = shape.base
    if one.tokens * base.hidden_size * _FLOAT32 > _HEAP_BLOCK_BYTES:
        return 0
    wide = one.tokens * base.intermediate_size * _FLOAT32
    return max(saved_by_layer(shape, one) - (4 * wide if wide > _HEAP_BLOCK_BYTES else 0), 0)


def attention_sizes(base: BaseModel) -> tuple[int, int, int]:
    """Number of query heads, and the features of all queries and of all keys."""
    config = base.config
    heads = int(config.get("num_attention_heads") or 1)
    head_dim = int(config.get("head_dim") or base.hidden_size // heads)
    return heads, heads * head_dim, int(config.get("num_key_value_heads") or heads) * head_dim


def _first_layer(layers: Iterable[LinearLayer]) -> list[LinearLayer]:
    """The linear layers of one decoder layer; those of all are alike."""
    found: dict[str, LinearLayer] = {}
    for layer in layers:
        found.setdefault(layer.leaf, layer)
    return list(found.values())


def _plain_attention_bytes(shape: StepShape, one: PassShape) -> int:
    """Attention in float32 over shared keys has no fused kernel on CUDA: probabilities of tokens by tokens are made."""
    heads, queries, key_values = attention_sizes(shape.base)
    if shape.precision.is_mixed or queries == key_values or shape.device_type != "cuda":
        return 0
    return _FLOAT32 * heads * one.longest * one.tokens


def _cast_bytes(shape: StepShape) -> int:
    """Trained weights in the type of the products, which the graph keeps; not of layers that are recomputed."""
    if not shape.precision.is_mixed:
        return 0
    recomputed = shape.num_trainable_parameters
    if shape.precision.trains_base:
        recomputed = shape.base.num_linear_parameters
    kept = shape.num_trainable_parameters - (recomputed if shape.recomputes else 0)
    return shape.precision.compute_bytes * kept


def _head_cast_bytes(shape: StepShape) -> int:
    """A frozen head in float32 is cast for the pass; a trained one is among the casts already."""
    is_cast = shape.precision.is_mixed and shape.precision.is_quantized
    return shape.precision.compute_bytes * shape.base.vocabulary_size * shape.base.hidden_size if is_cast else 0


def _rotary_bytes(shape: StepShape) -> int:
    """Sines and cosines of a token's position, and the numbers of token and position."""
    heads, queries, _ = attention_sizes(shape.base)
    return 2 * shape.precision.residual_bytes * queries // heads + 2 * 8


def _working_bytes(shape: StepShape, one: PassShape) -> int:
    """What comes and goes within a layer's feed-forward part: values and gradients, and a weight that is unpacked."""
    base, precision = shape.base, shape.precision
    values = 2 * base.intermediate_size * precision.inner_bytes + base.hidden_size * _FLOAT32
    unpacked = base.intermediate_size * base.hidden_size * precision.compute_bytes if precision.is_quantized else 0
    scores = 3 * _plain_attention_bytes(shape, one)
    return one.tokens * values + unpacked + scores
