"""Every way to keep less of a pass on CUDA: the same losses and gradients to the bit, again and again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpu_service.domain.recomputation import Recomputation

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

_LAYERS = 5
_WAYS = {
    "elementwise": Recomputation(elementwise_layers=_LAYERS),
    "feed-forward": Recomputation(feed_forward_layers=3, elementwise_layers=1),
    "whole": Recomputation(full_layers=_LAYERS),
    "offloaded": Recomputation(full_layers=_LAYERS, offload=True),
    "offloaded-in-part": Recomputation(full_layers=3, feed_forward_layers=1, offload=True),
}


@pytest.fixture(autouse=True)
def _adding_in_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention's backward kernel adds in any order unless torch is told that results must repeat."""
    import torch

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way", _WAYS)
def test_keeping_less_changes_nothing(way: str) -> None:
    import torch

    from tests.fakes.fast_models import fast_gradients, hold_in_nf4, make_fast, make_peft, nats
    from tests.fakes.flat_models import VOCABULARY_SIZE
    from tests.fakes.planned_rows import PlannedRows, make_examples

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    batches = [
        PlannedRows(make_examples(lengths, vocabulary_size=VOCABULARY_SIZE, seed=seed))
        for seed, lengths in enumerate(((300, 512, 40), (64,) * 9, (512,) * 6))
    ]
    results = []
    for recomputation in (Recomputation(), _WAYS[way]):
        model = make_peft(
            "llama",
            {"num_hidden_layers": _LAYERS},
            dtype=torch.bfloat16,
            quantize=lambda base: hold_in_nf4(base, device="cuda"),
        ).to("cuda")
        fast = make_fast(model, device="cuda", dtype=torch.bfloat16, recomputation=recomputation)
        found = []
        for rows in (*batches, *batches):
            values = nats(fast, rows, device="cuda")
            gradients = fast_gradients(model, fast, values.sum())
            found.append((values, torch.cat([one.flatten() for one in gradients.values()])))
        results.append(found)
    for (before, gradient), (after, again) in zip(*results, strict=True):
        assert torch.equal(before, after)
        assert torch.equal(gradient, again)
