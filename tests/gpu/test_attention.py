"""Attention's kernels against each other, for sequences of any lengths, launched and played as a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

_MIXED = (700, 33, 1, 260, 128, 30)


@pytest.fixture(autouse=True)
def _on_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


def _bounds(lengths: tuple[int, ...], capacity: int = 0) -> Any:
    """Of so many sequences at least, the last ones empty."""
    from itertools import accumulate

    import torch

    from gpu_service.engine.fast_path.attention import Bounds
    from gpu_service.engine.training.flat_attention import FlatLayout

    starts = [0, *accumulate(lengths)]
    starts += [starts[-1]] * (capacity + 1 - len(starts))
    return Bounds(
        starts=torch.tensor(starts, device="cuda", dtype=torch.int32),
        longest=max(lengths),
        layout=FlatLayout(lengths=lengths),
    )


def _draw(tokens: int, heads: int, key_value_heads: int, width: int) -> list[Any]:
    """Queries, keys and values as columns of one matrix, and a gradient."""
    import torch

    sizes = [heads * width, key_value_heads * width, key_value_heads * width]
    wide = torch.randn(tokens, sum(sizes), device="cuda", dtype=torch.bfloat16)
    gradient = torch.randn(tokens, heads, width, device="cuda", dtype=torch.bfloat16)
    return [*(part.unflatten(1, (-1, width)) for part in wide.split(sizes, dim=1)), gradient]


def _run(attention: Any, parts: list[Any], bounds: Any) -> list[Any]:
    query, key, value, gradient = parts
    output, kept = attention.forward(query, key, value, bounds)
    return [output, *attention.backward(gradient, query, key, value, output, kept, bounds)]


def _agree(found: list[Any], expected: list[Any], tolerance: float = 1e-2) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).float().norm() / theirs.float().norm()) < tolerance


def _newest(parts: list[Any]) -> Any:
    from gpu_service.engine.fast_path.flash_attention_4 import Preparation, is_installed

    if not is_installed():
        pytest.skip("flash-attn-4 is not installed")
    preparation = Preparation(parts[0], parts[1])
    preparation.wait()
    attention, problem = preparation.take()
    assert attention is not None, problem
    return attention


def test_empty_sequences_at_the_end_change_nothing() -> None:
    import torch

    from gpu_service.engine.fast_path.attention import FlashAttention

    parts = _draw(sum(_MIXED), 9, 3, 64)
    found, expected = (_run(FlashAttention(), parts, _bounds(_MIXED, capacity)) for capacity in (16, 0))
    assert torch.equal(found[0], expected[0])
    _agree(found, expected, 1e-3)


@pytest.mark.parametrize("heads", [(9, 3, 64), (24, 8, 128)])
@pytest.mark.parametrize("lengths", [_MIXED, (256, 256), (7,)])
def test_flash_attention_4_is_flash_attention_2(heads: tuple[int, int, int], lengths: tuple[int, ...]) -> None:
    from gpu_service.engine.fast_path.attention import FlashAttention

    parts = _draw(sum(lengths), *heads)
    newest = _newest(parts)
    _agree(_run(newest, parts, _bounds(lengths)), _run(FlashAttention(), parts, _bounds(lengths)))
    _agree(_run(newest, parts, _bounds(lengths, 16)), _run(FlashAttention(), parts, _bounds(lengths)))


def test_flash_attention_4_played_for_other_lengths() -> None:
    import torch

    from gpu_service.engine.fast_path.attention import FlashAttention
    from gpu_service.engine.fast_path.recorder import CudaRecorder

    parts = _draw(sum(_MIXED), 9, 3, 64)
    newest, bounds = _newest(parts), _bounds(_MIXED, 16)
    out: list[Any] = [torch.empty_like(one) for one in _run(newest, parts, bounds)]

    def work() -> None:
        for place, one in zip(out, _run(newest, parts, bounds), strict=True):
            place.copy_(one)

    play = CudaRecorder(torch.device("cuda", 0)).record(work)
    for lengths in (_MIXED, (100,) * 11 + (52,)):
        bounds.starts.copy_(_bounds(lengths, 16).starts)
        play()
        _agree(out, _run(FlashAttention(), parts, _bounds(lengths)))


def test_a_choice_is_made_and_said() -> None:
    from gpu_service.engine.fast_path.attention import CudnnAttention, FlashAttention, attention_for
    from gpu_service.engine.fast_path.attention_choice import AttentionChoice

    parts = _draw(1024, 8, 2, 64)
    choice = attention_for(parts[0].device, parts[0].dtype)
    if not isinstance(choice, AttentionChoice):
        pytest.skip("an older GPU has no choice")
    _agree(_run(choice, parts, _bounds((512, 512))), _run(FlashAttention(), parts, _bounds((512, 512))))
    assert isinstance(choice._chosen[True, 1024, 512], (FlashAttention, CudnnAttention))
    assert "rows of 512 tokens" in choice.take_notices()[0]


def test_rows_of_one_length_may_go_to_cudnn() -> None:
    import torch

    from gpu_service.engine.fast_path.attention import CudnnAttention, FlashAttention

    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN's attention is for Hopper")
    parts, bounds = _draw(1024, 8, 2, 64), _bounds((512, 512))
    _agree(_run(CudnnAttention(), parts, bounds), _run(FlashAttention(), parts, bounds))
