"""The fast path's kernels on a CUDA device against their references, and their bits against bitsandbytes."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

_TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def _on_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


def _draw(*shape: int, dtype: str, spare: int = 0, scale: float = 1.0) -> Any:
    """Random numbers whose rows lie `spare` further apart than they are wide."""
    import torch

    wide = torch.randn(*shape[:-1], shape[-1] + spare, device="cuda").mul(scale).to(getattr(torch, dtype))
    return wide[..., : shape[-1]]


def _agree(name: str, arguments: list[Any], changed: tuple[int, ...], dtype: str, **options: Any) -> None:
    """Run kernel and reference on copies; what they give and what they change must agree."""
    import torch

    from gpu_service.engine.fast_path import torch_reference, triton_kernels

    results = []
    for module in (triton_kernels, torch_reference):
        copies = [_copy(argument) for argument in arguments]
        given = getattr(module, name)(*copies, **options)
        parts = given if isinstance(given, tuple) else () if given is None else (given,)
        results.append([*parts, *(copies[number] for number in changed)])
    for found, expected in zip(*results, strict=True):
        tolerance = _TOLERANCES[dtype]
        torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def _copy(argument: Any) -> Any:
    import torch

    if not isinstance(argument, torch.Tensor):
        return argument
    copy = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=argument.device)
    return copy.copy_(argument)


@pytest.mark.parametrize("dtype", _TOLERANCES)
@pytest.mark.parametrize("width", [64, 896, 3072])
@pytest.mark.parametrize("adds", [True, False])
def test_norms(dtype: str, width: int, adds: bool) -> None:
    import torch

    x, add, out = (_draw(37, width, dtype=dtype, spare=spare) for spare in (0, 64, 64))
    weight, scale = _draw(width, dtype=dtype), torch.rand(37, device="cuda") + 0.5
    _agree("add_norm", [x, add if adds else None, weight, 1e-5, out], (4,), dtype)
    _agree("norm_backward_", [add, x, weight, scale, out], (4,), dtype, adds=adds)


@pytest.mark.parametrize("dtype", _TOLERANCES)
def test_norms_of_heads(dtype: str) -> None:
    import torch

    x, gradient, out = (_draw(33, 6 * 128, dtype=dtype, spare=256) for _ in range(3))
    weight, scale = _draw(128, dtype=dtype), torch.rand(33 * 6, device="cuda") + 0.5
    _agree("head_norm", [x, weight, 1e-6, out], (3,), dtype, heads=6)
    _agree("head_norm_backward", [gradient, x, weight, scale, out], (4,), dtype, heads=6)


@pytest.mark.parametrize("dtype", _TOLERANCES)
@pytest.mark.parametrize("heads", [3, 32])
@pytest.mark.parametrize("width", [16, 80, 128])
@pytest.mark.parametrize("backward", [True, False])
def test_rotation(dtype: str, heads: int, width: int, backward: bool) -> None:
    import torch

    x, out = (_draw(41, heads * width, dtype=dtype, spare=64) for _ in range(2))
    cosines, sines = torch.randn(2, 50, width // 2, device="cuda").unbind(0)
    places = torch.randint(0, 50, (41,), device="cuda")
    _agree("rotate", [x, cosines, sines, places, out], (4,), dtype, heads=heads, backward=backward)


@pytest.mark.parametrize("dtype", _TOLERANCES)
@pytest.mark.parametrize("width", [128, 4864, 8192])
def test_gates(dtype: str, width: int) -> None:
    gate_up, out = _draw(19, 2 * width, dtype=dtype, spare=64), _draw(19, width, dtype=dtype, spare=64)
    _agree("gate", [gate_up, out], (1,), dtype)
    _agree("gate_backward_", [out, gate_up], (1,), dtype)


@pytest.mark.parametrize("layers", [((512, 128, 128), (0, 1, 2)), ((512, 128, 128), (0, 2)), ((1024, 1024), (0, 1))])
@pytest.mark.parametrize("rank", [4, 16, 48, 80])
def test_adapters_products(layers: tuple[tuple[int, ...], tuple[int, ...]], rank: int) -> None:
    """Inner product and every B's gradient in one pass; of gates and ups while their own gradient is made."""
    import torch

    from gpu_service.engine.fast_path import torch_reference, triton_kernels
    from gpu_service.engine.fast_path.torch_reference import RankPart

    (sizes, covered), dtype = layers, "bfloat16"
    room, rows, width = -(-rank * len(covered) // 64) * 64, 700, sum(sizes)
    parts: list[RankPart] = []
    start = 5
    right = _draw(width, room, dtype=dtype, spare=64).zero_()
    for number in covered:
        first_row, first_rank = sum(sizes[:number]), rank * len(parts)
        parts.append(RankPart(first_row=first_row, num_rows=sizes[number], first_rank=first_rank, start_b=start))
        right[first_row : first_row + sizes[number], first_rank : first_rank + rank].normal_(std=width**-0.5)
        start += sizes[number] * rank
    gradient, ranks = _draw(rows, width, dtype=dtype, spare=room), _draw(rows, room, dtype=dtype, spare=64)
    of_gated = _draw(rows, width // 2, dtype=dtype)
    results: list[list[Any]] = []
    for module in (triton_kernels, torch_reference):
        prepared = module.prepare_ranks(parts, rank=rank, room=room, scaling=rows**-0.5, device=gradient.device)
        found = []
        for gated in (False, True) if len(sizes) == 2 else (False,):
            copy, inner = _copy(gradient), _draw(rows, room, dtype=dtype, spare=64).fill_(7)
            flat = torch.full((start + 3,), 2.0, device="cuda", dtype=gradient.dtype)
            if gated and (module is torch_reference or prepared.takes_gates):
                module.gate_adapter_backward_(of_gated, copy, right, ranks, inner, prepared, flat)
            else:
                if gated:
                    module.gate_backward_(of_gated, copy)
                module.adapter_backward(copy, right, ranks, inner, prepared, flat)
            found += [copy, inner, flat]
        results.append(found)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", _TOLERANCES)
@pytest.mark.parametrize("vocabulary", [512, 32001, 128256])
def test_likelihood(dtype: str, vocabulary: int) -> None:
    import torch

    logits = _draw(29, vocabulary, dtype=dtype, scale=3.0)
    labels = torch.randint(0, vocabulary, (29,), device="cuda")
    _agree("cross_entropy_", [logits, labels, torch.empty(29, device="cuda")], (0, 2), dtype)


@pytest.mark.parametrize("dtype", _TOLERANCES)
@pytest.mark.parametrize("double", [True, False])
# The last has one scale alone, which is its own mean.
@pytest.mark.parametrize("shape", [(1024, 3072), (96, 64), (300, 8192), (1, 64)])
def test_bits_are_those_of_bitsandbytes(dtype: str, double: bool, shape: tuple[int, int]) -> None:
    """Restored and quantized, against the library's own CUDA kernels."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from gpu_service.engine.fast_path import quantizing, triton_kernels
    from gpu_service.engine.fast_path.nf4 import NotNf4

    weight = _draw(*shape, dtype=dtype, scale=0.02).contiguous()
    weight[3:4, :64] = 0
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    nested: Any = (state.state2.code, state.state2.absmax, state.offset) if double else (None, None, None)
    if dtype == "float32":
        with pytest.raises(NotNf4):
            quantizing.quantize(weight, double=double)
    else:
        found: Any = quantizing.quantize(weight, double=double)
        assert torch.equal(found.packed, packed)
        assert torch.equal(found.scales, state.absmax)
        if double:
            assert torch.equal(quantizing.nested_codes(weight.device), nested[0])
            assert torch.equal(found.nested_scales, nested[1])
            assert torch.equal(found.offset, nested[2])
    out = torch.full((shape[0], shape[1] + 64), 7.0, device="cuda", dtype=weight.dtype)
    arguments = [packed, state.code, state.absmax, *nested, out[:, : shape[1]]]
    triton_kernels.nf4_dequantize(*arguments)
    assert torch.equal(out[:, : shape[1]], dequantize_4bit(packed, state))
    assert (out[:, shape[1] :] == 7).all()


@pytest.mark.parametrize("dtype", _TOLERANCES)
def test_adapters_are_copied_out(dtype: str) -> None:
    import torch

    from gpu_service.engine.fast_path import torch_reference, triton_kernels

    flat = torch.randn(16 * 3072 + 1000 * 16 + 7, device="cuda")
    results = []
    for module in (triton_kernels, torch_reference):
        below, right = _draw(64, 3072, dtype=dtype, spare=64).zero_(), _draw(1024, 64, dtype=dtype, spare=8).zero_()
        prepared = module.prepare_copies([(0, below[16:32], 1.0), (16 * 3072, right[24:, 16:32], 0.3)])
        module.copy_out(flat, prepared)
        results.append((below, right))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
