"""Products in 8 bits on the fast path: exact but for rounding, and an adapter's part as exact as in bfloat16."""

from __future__ import annotations

import pytest
import torch

from gpu_service.domain.recomputation import Recomputation
from gpu_service.engine.fast_path import fp8_reference, torch_reference
from gpu_service.engine.fast_path.fp8 import RoundedGroup
from gpu_service.engine.fast_path.fp8_reference import RoundedCopy
from gpu_service.engine.fast_path.frozen import FrozenGroup
from tests.fakes.fast_models import fast_gradients, hold_in_nf4, make_fast, make_peft, nats, plain_gradients
from tests.fakes.flat_models import LENGTHS, VOCABULARY_SIZE
from tests.fakes.planned_rows import PlannedRows, make_examples


@pytest.fixture(scope="module")
def rows() -> PlannedRows:
    return PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3))


def _weighted(by_sequence: torch.Tensor) -> torch.Tensor:
    """A loss to which every sequence counts differently, as no mean does."""
    return (by_sequence * torch.linspace(0.5, 2.0, len(by_sequence), dtype=by_sequence.dtype)).sum() / 100


def _keep(x: torch.Tensor) -> torch.Tensor:
    return x.float().clone()


def _round_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_products_in_8_bits_differ_by_rounding_alone(
    family: str, rows: PlannedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact without rounding. Rows have 4 bits less than in bfloat16, so that errors are about 16 times those of it."""
    reference = make_peft(family, quantize=hold_in_nf4)
    expected = nats(reference, rows)
    exact = plain_gradients(reference, _weighted(expected))
    errors = []
    for rounding in (_keep, _round_to_bfloat16, fp8_reference.to_8_bits):
        with monkeypatch.context() as patch:
            patch.setattr(fp8_reference, "to_8_bits", rounding)
            model = make_peft(family, quantize=hold_in_nf4)
            fast = make_fast(model, in_fp8=True)
            found = nats(fast, rows)
            gradients = fast_gradients(model, fast, _weighted(found))
            with torch.no_grad(), fast.disable_adapter(), reference.disable_adapter():
                of_base = (nats(fast, rows) - nats(reference, rows)).abs().sum()
        flat, exact_flat = (torch.cat([one[name].flatten() for name in exact]) for one in (gradients, exact))
        apart = (found - expected).abs().sum() / expected.sum()
        errors.append((float(apart), float((flat - exact_flat).norm() / exact_flat.norm()), float(of_base)))
    kept, narrower, in_8_bits = errors
    assert max(kept[:2]) < 1e-5
    assert kept[2] < 1e-3
    assert 2 * narrower[1] < in_8_bits[1] < 24 * narrower[1]
    assert 1e-6 < in_8_bits[0] < 0.01


@pytest.mark.parametrize(("num_layers", "rounded"), [(2, [0, 1]), (8, [2, 3, 4, 5, 6])])
def test_the_first_two_blocks_and_the_last_are_not_rounded(num_layers: int, rounded: list[int]) -> None:
    model = make_peft("llama", {"num_hidden_layers": num_layers}, quantize=hold_in_nf4)
    found = [type(one.frozen) for one in make_fast(model, in_fp8=True)._projections]
    # Four of them a block.
    assert found == [RoundedGroup if number // 4 in rounded else FrozenGroup for number in range(4 * num_layers)]


def test_rows_in_8_bits() -> None:
    """The largest of a row is exact, the others are within half a step of three bits."""
    x = torch.randn(50, 96) * torch.logspace(-6, 3, 50)[:, None]
    x[7] = 0
    values, scales = torch_reference.round_rows(x, None, 96, small_ranks=False)
    assert values.dtype is torch.float8_e4m3fn
    assert scales.shape == (50, 1)
    back = values.float() * scales
    largest = x.abs().amax(1)
    assert torch.equal(values.float().abs().amax(1), torch.where(largest > 0, 448.0, 0.0))
    assert ((back - x).abs() <= x.abs() / 16 + largest[:, None] * 2**-9 / 448).all()
    identity = torch.eye(96).to(torch.float8_e4m3fn)
    product = torch.empty(50, 96)
    torch_reference.multiply_rounded(values, scales, identity, torch.ones(96, 1), product)
    torch.testing.assert_close(product, back)


_TOKENS, _IN, _OUT, _RANK = 96, 1024, 160, 16


def _adapters_part(
    rounded: tuple[torch.Tensor, torch.Tensor], weights: torch.Tensor, b: torch.Tensor, *, small_ranks: bool = False
) -> torch.Tensor:
    """What B adds to a product in 8 bits: with it, less the same without it."""
    columns, products = fp8_reference.padded(_IN, _RANK), []
    for factor in (2.0, 0.0):
        values, scales = torch_reference.round_weights(weights, columns)
        copy = RoundedCopy(
            start=0,
            rows=_OUT,
            rank=_RANK,
            row_step=_RANK,
            rank_step=1,
            factor=factor,
            values=values,
            scales=scales,
            step=_RANK,
            small_ranks=small_ranks,
        )
        torch_reference.round_out(b.flatten(), torch_reference.prepare_rounded([copy]), torch.bfloat16)
        out = torch.empty(_TOKENS, _OUT)
        torch_reference.multiply_rounded(*rounded, values, scales, out)
        products.append(out.double())
    return products[0] - products[1]


@pytest.mark.parametrize("outlier", [1.0, 300.0])
@pytest.mark.parametrize(
    ("size", "tolerance"), [(1e-5, 0.02), (1e-4, 2**-8), (1e-3, 2**-8), (1e-2, 2**-8), (0.1, 2**-8)]
)
def test_adapters_part_has_the_bits_of_bfloat16(size: float, tolerance: float, outlier: float) -> None:
    """B as training has it, in the forward direction; and its like coming back, where ranks are what is small."""
    torch.manual_seed(0)
    x, weights = torch.randn(_TOKENS, _IN).bfloat16(), torch.randn(_OUT, _IN) * 0.02
    x[:, 7] *= outlier
    x[::3, 100] *= 5 * outlier
    a, columns = ((torch.rand(_RANK, _IN) * 2 - 1) / _IN**0.5).bfloat16(), fp8_reference.padded(_IN, _RANK)
    ranks = (x.float() @ a.float().t()).bfloat16()
    b = (torch.randn(_OUT, _RANK) * size).bfloat16()
    made_before = torch_reference.round_rows(x, ranks, columns, small_ranks=False)
    bound = torch.zeros(())
    torch_reference.bound_ranks(torch_reference.prepare_bounds([a], [bound]))
    made_after = torch_reference.round_bounded(x, bound, columns)
    torch_reference.rank_beside(x, a, torch.empty_like(ranks), *made_after)
    for rounded in (made_before, made_after):
        found = _adapters_part(rounded, weights, b.float())
        assert _apart(found, ranks, b) < tolerance
    # The larger rows are, the more is small beside them: what comes back is that small where nothing stands out.
    ranks, b = ranks * (size / 1e-2), (torch.randn(_OUT, _RANK) * 1e-2).bfloat16()
    rounded = torch_reference.round_rows(x, ranks, columns, small_ranks=True)
    found = _adapters_part(rounded, weights, b.float(), small_ranks=True)
    assert _apart(found, ranks, b) < tolerance


def _apart(found: torch.Tensor, ranks: torch.Tensor, b: torch.Tensor) -> float:
    """Of the row that is farthest off."""
    expected = ranks.double() @ b.double().t() * 2
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


def test_no_rank_is_larger_than_its_bound() -> None:
    """Not even of rows that are all along one factor, and spread so that no number of theirs stands out."""
    torch.manual_seed(0)
    factors = (torch.randn(_RANK, _IN).sign() * torch.linspace(0.1, 3, _RANK)[:, None]).bfloat16()
    x = torch.cat((factors, -3 * factors, torch.randn(4, _IN).bfloat16(), torch.zeros(1, _IN).bfloat16()))
    bound, ranks = torch.zeros(()), torch.empty(len(x), _RANK, dtype=torch.bfloat16)
    torch_reference.bound_ranks(torch_reference.prepare_bounds([factors], [bound]))
    columns = fp8_reference.padded(_IN, _RANK)
    values, scales = torch_reference.round_bounded(x, bound, columns)
    torch_reference.rank_beside(x, factors, ranks, values, scales)
    largest = (ranks.float() / scales).abs().amax(1)
    assert 400 < largest.max() <= fp8_reference.LARGEST
    assert values.float().isfinite().all()
    assert torch.equal(values[:, : 3 * _RANK].float().abs().amax(1) > 0, ranks.abs().amax(1) > 0)
    assert not values[:, 3 * _RANK : columns - _IN].float().any()
    # Rows are what they are rounded to, less a few octaves of the smallest.
    back = values[:, columns - _IN :].float() * scales
    assert ((back - x.float()).abs() <= x.float().abs() / 16 + scales * 2**-10).all()


def test_adapter_without_room_is_not_a_number() -> None:
    """Never a largest number in its place: whoever watches for NaN stops."""
    torch.manual_seed(0)
    x, weights, b = torch.randn(_TOKENS, _IN), torch.randn(_OUT, _IN) * 0.02, torch.zeros(_OUT, _RANK)
    weights[5] = 0
    ranks, columns = torch.randn(_TOKENS, _RANK), fp8_reference.padded(_IN, _RANK)
    rounded = torch_reference.round_rows(x, ranks, columns, small_ranks=False)
    # Times two. Row 3 has 16 times its largest weight, row 5 what a row without weights has.
    b[3, 2], b[5, 0] = 7.9 * weights[3].abs().max(), 0.24
    assert _adapters_part(rounded, weights, b).isfinite().all()
    b[3, 2] *= 1.05
    found = _adapters_part(rounded, weights, b)
    assert found.isnan().all(0).tolist() == [number == 3 for number in range(_OUT)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "recomputation",
    [Recomputation(elementwise_layers=2), Recomputation(feed_forward_layers=2), Recomputation(full_layers=2)],
    ids=["elementwise", "feed-forward", "whole"],
)
def test_recomputing_in_8_bits_changes_nothing(
    recomputation: Recomputation, dtype: torch.dtype, rows: PlannedRows
) -> None:
    found = []
    for way in (Recomputation(), recomputation):
        model = make_peft("llama", quantize=hold_in_nf4, dtype=dtype)
        fast = make_fast(model, dtype=dtype, in_fp8=True, recomputation=way)
        values = nats(fast, rows)
        found.append([values, *fast_gradients(model, fast, _weighted(values)).values()])
    assert all(torch.equal(before, after) for before, after in zip(*found, strict=True))


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "down_proj"), ("k_proj", "up_proj")])
def test_any_linears_may_be_trained_in_8_bits(
    targets: tuple[str, ...], rows: PlannedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_reference, "to_8_bits", _keep)
    reference = make_peft(quantize=hold_in_nf4, targets=targets)
    expected = nats(reference, rows)
    exact = plain_gradients(reference, _weighted(expected))
    model = make_peft(quantize=hold_in_nf4, targets=targets)
    fast = make_fast(model, in_fp8=True)
    found = nats(fast, rows)
    gradients = fast_gradients(model, fast, _weighted(found))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in exact.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max()
