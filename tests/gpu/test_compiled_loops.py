"""Kernels with products, compiled for the device: no copy overtakes a product that still reads what it writes over.

Such a kernel is right nearly always, and then a piece of a row is another one's: comparing results finds it by chance.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.compiled_loops import find_overtaken

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

_TOKENS, _WIDTH = 256, 3072


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("only from Hopper on are products made in the background")


def _rows(rows: int, columns: int, *, room: int = 64) -> Any:
    """Rows of numbers in bfloat16, `room` further apart than they are wide."""
    import torch

    return torch.ones(rows, columns + room, device="cuda", dtype=torch.bfloat16)[:, :columns]


def _launch_rounding() -> None:
    from gpu_service.engine.fast_path import fp8_rank_kernels
    from gpu_service.engine.fast_path.fp8_reference import padded

    for used in (16, 32, 48, 100):
        x, ranks, columns = _rows(_TOKENS, _WIDTH), _rows(_TOKENS, used), padded(_WIDTH, used)
        for factors in (_rows(used, _WIDTH), _rows(_WIDTH, used).t()):
            rounded = fp8_rank_kernels.rank_and_round(x, factors, ranks, columns, small_ranks=False)
            fp8_rank_kernels.rank_rows(x, factors, ranks)
            fp8_rank_kernels.rank_beside(x, factors, ranks, *rounded)


def _launch_adapters() -> None:
    import torch

    from gpu_service.engine.fast_path import adapter_kernels
    from gpu_service.engine.fast_path.torch_reference import RankPart

    for rank in (8, 16, 32):
        parts = [
            RankPart(
                first_row=number * _WIDTH, num_rows=_WIDTH, first_rank=number * rank, start_b=number * _WIDTH * rank
            )
            for number in range(2)
        ]
        prepared = adapter_kernels.prepare_ranks(parts, rank=rank, room=64, scaling=1.0, device=torch.device("cuda"))
        gradient, right, ranks, inner = (
            _rows(*sizes) for sizes in ((_TOKENS, 2 * _WIDTH), (2 * _WIDTH, 64), (_TOKENS, 64), (_TOKENS, 64))
        )
        flat = torch.zeros(2 * _WIDTH * rank, device="cuda")
        adapter_kernels.adapter_backward(gradient, right, ranks, inner, prepared, flat)
        gate_up = _rows(_TOKENS, 2 * _WIDTH)
        adapter_kernels.gate_adapter_backward_(_rows(_TOKENS, _WIDTH), gate_up, right, ranks, inner, prepared, flat)


def _launch_dropout() -> None:
    import torch

    from gpu_service.engine.fast_path import dropout_kernels

    key = torch.zeros(1, dtype=torch.int64, device="cuda")
    for rank in (8, 16, 32, 64):
        options: dict[str, Any] = {
            "key": key, "first_row": 0, "first_layer": 0, "num_layers": 1, "rank": rank, "probability": 0.1
        }  # fmt: skip
        rows, below, ranks = _rows(_TOKENS, _WIDTH), _rows(64, _WIDTH), _rows(_TOKENS, 64)
        dropout_kernels.drop_and_rank(rows, below, ranks, **options)
        dropout_kernels.drop_and_weigh(ranks, rows, _rows(rank, _WIDTH, room=0), **options)
        dropout_kernels.drop_and_add(ranks, below, rows, **options)


def test_no_copy_overtakes_a_product() -> None:
    from gpu_service.engine.fast_path import adapter_kernels, dropout_kernels, fp8_rank_kernels
    from gpu_service.engine.fast_path.launching import Launched

    _launch_rounding()
    _launch_adapters()
    _launch_dropout()
    found: dict[str, set[str]] = {}
    for module in (fp8_rank_kernels, adapter_kernels, dropout_kernels):
        for kernel in vars(module).values():
            for compiled in kernel.compiled() if isinstance(kernel, Launched) else ():
                if "dot" in compiled.asm["ttgir"]:
                    found.setdefault(kernel.name, set()).update(find_overtaken(compiled.asm["ttgir"]))
    products = {"_rank_and_round", "_adapter_backward", "_gate_adapter_backward"}
    assert found.keys() == products | {"_drop_and_rank", "_drop_and_weigh", "_drop_and_add"}
    assert not any(found.values()), found
