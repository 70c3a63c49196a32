"""Dropout of the fast path on a CUDA device: kernels against their references, and a whole pass against float32."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

_TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
_PROBABILITY = 0.3


@pytest.fixture(autouse=True)
def _on_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


def _draw(rows: int, columns: int, dtype: str, spare: int = 64) -> Any:
    import torch

    return torch.randn(rows, columns + spare, device="cuda").to(getattr(torch, dtype))[:, :columns]


@pytest.mark.parametrize("dtype", _TOLERANCES)
@pytest.mark.parametrize(("layers", "rank"), [(3, 16), (1, 8), (2, 64), (3, 4)])
@pytest.mark.parametrize("width", [64, 896, 3072])
def test_kernels(dtype: str, layers: int, rank: int, width: int) -> None:
    import torch

    from gpu_service.engine.fast_path import dropout, dropout_kernels

    room = -(-layers * rank // 64) * 64
    rows, inner = _draw(197, width, dtype), _draw(197, room, dtype)
    below = _draw(room, width, dtype).div_(width**0.5)
    below[layers * rank :] = 0
    key = torch.randint(2**62, (1,), device="cuda")
    options: Any = {
        "key": key, "first_row": 384, "first_layer": 5, "num_layers": layers, "rank": rank, "probability": _PROBABILITY
    }  # fmt: skip
    kind = getattr(torch, dtype)
    for name in ("drop_and_rank", "drop_and_weigh", "drop_and_add"):
        found = []
        for module in (dropout_kernels, dropout):
            if name == "drop_and_rank":
                out = torch.full((197, room + 8), float("nan"), device="cuda", dtype=kind)[:, :room]
                module.drop_and_rank(rows, below, out, **options)
            elif name == "drop_and_weigh":
                out = torch.full((layers * rank, width), float("nan"), device="cuda", dtype=kind)
                module.drop_and_weigh(inner, rows, out, **options)
            else:
                out = rows.clone()
                module.drop_and_add(inner, below, out, **options)
            found.append(out.float())
        ours, theirs = found
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=_TOLERANCES[dtype], atol=_TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", _TOLERANCES)
def test_pass_is_that_of_the_references(dtype: str) -> None:
    """The same key on both devices: the same masks, hence the same gradient up to rounding."""
    import torch

    from tests.fakes.fast_models import fast_gradients, make_fast, make_peft, nats
    from tests.fakes.flat_models import LENGTHS, VOCABULARY_SIZE
    from tests.fakes.planned_rows import PlannedRows, make_examples

    rows = PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3))
    results = []
    for device, kind in (("cuda", getattr(torch, dtype)), ("cpu", getattr(torch, dtype)), ("cpu", torch.float32)):
        model = make_peft(dtype=kind)
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(_PROBABILITY)
        model = model.to(device).train()
        fast = make_fast(model, device=device, dtype=kind)
        torch.manual_seed(7)
        found = nats(fast, rows, device=device)
        gradients = fast_gradients(model, fast, found.sum() / 100)
        results.append(torch.cat([one.flatten().cpu() for one in gradients.values()]))
    ours, references, exact = results
    error, rounding = (float((one - exact).norm() / exact.norm()) for one in (ours, references))
    # No worse than what the type's rounding alone does to the references.
    assert error < (1e-4 if dtype == "float32" else 1.5 * rounding)
    assert rounding < 0.1
