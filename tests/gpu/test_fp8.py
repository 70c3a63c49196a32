"""Products in 8 bits on a CUDA device: kernels against references, byte by byte where nothing is summed up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpu_service.domain.recomputation import ELEMENTWISE, FEED_FORWARD, FULL, Recomputation

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("products of rows with scales are for Hopper")
    torch.manual_seed(0)


def _draw(rows: int, columns: int, *, spare: int = 0, scale: float = 1.0) -> Any:
    """Random numbers in bfloat16 whose rows lie `spare` further apart than they are wide; two stand out."""
    import torch

    wide = torch.randn(rows, columns + spare, device="cuda").mul(scale)
    wide[rows // 3, columns // 2] *= 1000
    wide[rows // 2] *= 1e-4
    return wide.bfloat16()[:, :columns]


def _same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    import torch

    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8))


@pytest.mark.parametrize("width", [64, 576, 3072, 16384])
@pytest.mark.parametrize("used", [0, 4, 48])
@pytest.mark.parametrize("small_ranks", [True, False])
def test_rows(width: int, used: int, small_ranks: bool) -> None:
    from gpu_service.engine.fast_path import torch_reference, triton_kernels
    from gpu_service.engine.fast_path.fp8_reference import padded

    x, ranks, columns = _draw(200, width, spare=64), _draw(200, used, spare=64), padded(width, 48)
    given = ranks if used else None
    found = triton_kernels.round_rows(x, given, columns, small_ranks=small_ranks)
    _same(found, torch_reference.round_rows(x, given, columns, small_ranks=small_ranks))
    _same(triton_kernels.round_weights(x, columns), torch_reference.round_weights(x, columns))


@pytest.mark.parametrize("shape", [(200, 576, 4), (700, 3072, 48), (130, 8192, 16), (90, 3072, 100), (90, 512, 200)])
@pytest.mark.parametrize("turned", [True, False])
def test_rows_with_ranks_made_on_the_way(shape: tuple[int, int, int], turned: bool) -> None:
    """Ranks are those of a plain product; rounded they are what they are rounded to by themselves."""
    import torch

    from gpu_service.engine.fast_path import torch_reference, triton_kernels
    from gpu_service.engine.fast_path.fp8_reference import padded

    rows, width, used = shape
    x, margin = _draw(rows, width, spare=256), _draw(rows, 256)
    factors = (_draw(width, used, spare=8).t() if turned else _draw(used, width)) * width**-0.5
    made, columns = margin[:, :used], padded(width, used)
    found = triton_kernels.rank_and_round(x, factors, made, columns, small_ranks=turned)
    expected = x.float() @ factors.float().t()
    apart = (made.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert apart.max() < 5e-3
    _same(found, torch_reference.round_rows(x, made, columns, small_ranks=turned))
    # Where rows are made again, they get the same ranks.
    again = torch.zeros_like(margin)[:, :used]
    triton_kernels.rank_rows(x, factors, again)
    assert torch.equal(again, made)


@pytest.mark.parametrize("width", [576, 8192])
@pytest.mark.parametrize("used", [4, 16, 200])
def test_gated_rows_are_rounded_where_they_are_made(width: int, used: int) -> None:
    import torch

    from gpu_service.engine.fast_path import torch_reference, triton_kernels
    from gpu_service.engine.fast_path.fp8_reference import padded

    rows, columns = 150, padded(width, used)
    gate_up, out = _draw(rows, 2 * width, spare=64), _draw(rows, width, spare=64)
    factors, margin = (torch.randn(used, width, device="cuda") * width**-0.5).bfloat16(), _draw(rows, 256)
    bounds = torch.zeros(2, device="cuda")
    for module, bound in zip((triton_kernels, torch_reference), bounds, strict=True):
        module.bound_ranks(module.prepare_bounds([factors], [bound]))
    assert bounds[0].item() == pytest.approx(bounds[1].item(), rel=1e-5)
    values, scales = triton_kernels.gate_and_round(gate_up, out, bounds[0], columns)
    gated = torch.empty_like(out)
    torch_reference.gate(gate_up, gated)
    torch.testing.assert_close(out, gated, rtol=1e-2, atol=1e-2)
    expected, expected_scales = torch_reference.round_bounded(out, bounds[0], columns)
    # Norms are summed up in another order: a last bit of a scale may move a number to its neighbor.
    torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0)
    assert (values.view(torch.uint8) != expected.view(torch.uint8)).float().mean() < 1e-3
    triton_kernels.rank_beside(out, factors, margin[:, :used], values, scales)
    again, other = margin.clone(), values.clone()
    torch_reference.rank_beside(out, factors, again[:, :used], other, scales)
    ranks, others = margin[:, :used].float(), again[:, :used].float()
    assert (ranks - others).norm() / others.norm() < 5e-3
    assert torch.equal(margin[:, used:], again[:, used:])
    one, two = (part[:, : 3 * used].float() * scales for part in (values, other))
    assert (one - two).norm() / two.norm() < 5e-2
    assert torch.equal(values[:, 3 * used :].view(torch.uint8), other[:, 3 * used :].view(torch.uint8))


@pytest.mark.parametrize("rank", [4, 16, 80])
def test_adapter_is_written_beside_the_weights(rank: int) -> None:
    import torch

    from gpu_service.engine.fast_path import torch_reference, triton_kernels
    from gpu_service.engine.fast_path.fp8_reference import RoundedCopy, padded

    rows, width, used = 700, 520, 2 * rank
    flat = torch.randn(3 + rank * (rows + width), device="cuda") * 0.01
    # Has no room there.
    flat[3 + 7 * rank] = 100.0
    results = []
    for module in (triton_kernels, torch_reference):
        torch.manual_seed(1)
        matrix = torch.randn(rows + 40, width, device="cuda").bfloat16() * 0.02
        forward = triton_kernels.round_weights(matrix, padded(width, used))
        back = triton_kernels.round_weights(matrix.t().contiguous(), padded(rows + 40, used))
        of_b = RoundedCopy(
            start=3,
            rows=rows,
            rank=rank,
            row_step=rank,
            rank_step=1,
            factor=0.3,
            values=forward[0][20 : 20 + rows, rank:],
            scales=forward[1][20 : 20 + rows],
            step=used,
            small_ranks=False,
        )
        of_a = replace(
            of_b,
            start=3 + rank * rows,
            rows=width,
            row_step=1,
            rank_step=width,
            factor=1.0,
            values=back[0][:, rank:],
            scales=back[1],
            small_ranks=True,
        )
        module.round_out(flat, module.prepare_rounded([of_b, of_a]), torch.bfloat16)
        results.append((forward[0].view(torch.uint8), back[0].view(torch.uint8)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert torch.isnan(results[0][0].view(torch.float8_e4m3fn).float()).any(1).nonzero().tolist() == [[27]]


@pytest.mark.parametrize("spare", [0, 64])
@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_products(size: float, spare: int) -> None:
    """Into rows that lie further apart than they are wide, too; what an adapter adds is lost in no sum."""
    import torch

    from gpu_service.engine.fast_path import torch_reference, triton_kernels
    from gpu_service.engine.fast_path.fp8_reference import RoundedCopy, padded

    rows, width, outputs, rank = 384, 3072, 512, 16
    x, ranks = (torch.randn(rows, columns, device="cuda").bfloat16() for columns in (width, rank))
    columns = padded(width, rank)
    values, scales = triton_kernels.round_weights(torch.randn(outputs, width, device="cuda") * 0.02, columns)
    b = torch.randn(outputs, rank, device="cuda") * size
    copy = RoundedCopy(
        start=0,
        rows=outputs,
        rank=rank,
        row_step=rank,
        rank_step=1,
        factor=1.0,
        values=values,
        scales=scales,
        step=rank,
        small_ranks=False,
    )
    rounded = triton_kernels.round_rows(x, ranks, columns, small_ranks=False)
    found, expected, before = (_draw(rows, outputs, spare=spare).zero_() for _ in range(3))
    triton_kernels.multiply_rounded(*rounded, values, scales, before)
    triton_kernels.round_out(b.flatten(), triton_kernels.prepare_rounded([copy]), torch.bfloat16)
    triton_kernels.multiply_rounded(*rounded, values, scales, found)
    torch_reference.multiply_rounded(*rounded, values, scales, expected)
    assert (found - expected).float().norm() / expected.float().norm() < 1e-2
    # Along the adapter's own direction roundings of the sum cancel out; what it is added up in has few bits.
    part = ranks.float() @ b.bfloat16().float().t()
    added = (found.float() - before.float()).mul(part).sum() / part.square().sum()
    assert abs(added.item() - 1) < (0.15 if size == 1e-4 else 0.02)


def test_training_is_what_its_reference_computes() -> None:
    """The same model over the kernels and over the references of rounding and products, all else alike."""
    import torch

    from gpu_service.engine.fast_path import torch_reference, triton_kernels
    from tests.fakes.fast_models import fast_gradients, hold_in_nf4, make_fast, make_peft, nats

    names = (
        "round_rows",
        "rank_rows",
        "rank_and_round",
        "rank_beside",
        "gate_and_round",
        "multiply_rounded",
        "prepare_rounded",
        "round_out",
        "prepare_bounds",
        "bound_ranks",
    )
    results = []
    for module in (triton_kernels, torch_reference):
        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(triton_kernels, name, getattr(module, name))
            model = make_peft(dtype=torch.bfloat16, quantize=lambda base: hold_in_nf4(base, device="cuda")).to("cuda")
            fast = make_fast(model, device="cuda", dtype=torch.bfloat16, in_fp8=True)
            found = nats(fast, _rows(), device="cuda").sum() / 100
            results.append((float(found.detach()), fast_gradients(model, fast, found)))
    (ours, gradients), (expected, expected_gradients) = results
    assert ours == pytest.approx(expected, rel=2e-3)
    flat, exact = (torch.cat([one[name].flatten() for name in one]) for one in (gradients, expected_gradients))
    # A last bit of bfloat16 may move a value to its neighbor in 8 bits.
    assert float((flat - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("level", [ELEMENTWISE, FEED_FORWARD, FULL])
def test_recomputing_changes_nothing(level: str) -> None:
    import torch

    from tests.fakes.fast_models import fast_gradients, hold_in_nf4, make_fast, make_peft, nats

    found = []
    ways = {
        ELEMENTWISE: Recomputation(elementwise_layers=2),
        FEED_FORWARD: Recomputation(feed_forward_layers=2),
        FULL: Recomputation(full_layers=2),
    }
    for way in (Recomputation(), ways[level]):
        model = make_peft(dtype=torch.bfloat16, quantize=lambda base: hold_in_nf4(base, device="cuda")).to("cuda")
        fast = make_fast(model, device="cuda", dtype=torch.bfloat16, in_fp8=True, recomputation=way)
        values = nats(fast, _rows(), device="cuda")
        found.append([values, *fast_gradients(model, fast, values.sum() / 100).values()])
    assert all(torch.equal(before, after) for before, after in zip(*found, strict=True))


def _rows() -> Any:
    from tests.fakes.flat_models import LENGTHS, VOCABULARY_SIZE
    from tests.fakes.planned_rows import PlannedRows, make_examples

    return PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3))
