"""Full training on a CUDA device: kernels against references, whole models against transformers in float32."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

_TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}


@pytest.fixture(autouse=True)
def _on_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


def _both(name: str, changed: tuple[int, ...], arguments: list[Any], dtype: str, **options: Any) -> None:
    """Run kernel and reference on copies of their own; what they change must agree."""
    import torch

    from gpu_service.engine.fast_path import full_kernels, full_reference

    results = []
    for module in (full_kernels, full_reference):
        copies = [one.clone() if isinstance(one, torch.Tensor) else one for one in arguments]
        getattr(module, name)(*copies, **options)
        results.append([copies[place] for place in changed])
    for found, expected in zip(*results, strict=True):
        scale = float(expected.float().abs().max())
        tolerance = _TOLERANCES[dtype]
        torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance * scale)


def _draw(rows: int, columns: int, dtype: str, spare: int = 0) -> Any:
    import torch

    return torch.randn(rows, columns + spare, device="cuda").to(getattr(torch, dtype))[:, :columns]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(("dtype", "held"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
def test_weights_gradient(dtype: str, held: str, adds: bool) -> None:
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        _both("weigh", (2,), [_draw(300, 192, dtype, 64), _draw(300, 128, dtype), _draw(192, 128, held)], dtype,
              adds=adds)  # fmt: skip
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_sums_in_float32_lose_nothing() -> None:
    import torch

    from gpu_service.engine.fast_path import full_kernels

    gradient, rows = _draw(256, 64, "bfloat16"), _draw(256, 64, "bfloat16")
    out = torch.zeros(64, 64, device="cuda")
    for number in range(64):
        full_kernels.weigh(gradient, rows, out, adds=number > 0)
    torch.testing.assert_close(out, 64 * (gradient.float().t() @ rows.float()), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(("rows", "heads", "width"), [(700, 1, 3072), (37, 6, 128), (5, 1, 64), (0, 1, 64)])
@pytest.mark.parametrize("held", ["bfloat16", "float32"])
def test_norms_gradient(held: str, rows: int, heads: int, width: int, adds: bool) -> None:
    import torch

    gradient, x = (_draw(rows, heads * width, "bfloat16", 64) for _ in range(2))
    scale, out = torch.rand(rows * heads, device="cuda") + 0.5, _draw(1, width, held)[0]
    _both("weigh_norm", (3,), [gradient, x, scale, out], held, heads=heads, adds=adds)


@pytest.mark.parametrize("held", ["bfloat16", "float32"])
@pytest.mark.parametrize("vocabulary", [3, 5000])
def test_embeddings_gradient(held: str, vocabulary: int) -> None:
    import torch

    tokens = torch.randint(0, vocabulary, (900,), device="cuda")
    arguments = [_draw(900, 1500, "bfloat16", 36), tokens, _draw(vocabulary, 1500, held)]
    _both("add_rows", (2,), arguments, held)


@pytest.mark.parametrize("gradient", ["bfloat16", "float32"])
@pytest.mark.parametrize("goes", [0.0, 1.0])
def test_step(gradient: str, goes: float) -> None:
    import torch

    from gpu_service.engine.fast_path.full_reference import AdamSettings, StepNumbers

    held, first, second = torch.randn(3, 70_001, device="cuda").unbind(0)
    # As every step leaves it: one that is left out changes nothing.
    working = held.to(torch.bfloat16)
    numbers = torch.tensor([1e-2, 1.5, 0.3, goes], device="cuda")
    arguments = [held.clone(), working, _draw(1, 70_001, gradient)[0], first.clone(), second.abs() * 1e-2,
                 StepNumbers(learning_rate=1e-2, numbers=numbers),
                 AdamSettings(beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1)]  # fmt: skip
    _both("step_adamw", (0, 3, 4), arguments, "float32")
    _both("step_adamw", (1,), arguments, "bfloat16")


def _rows() -> Any:
    from tests.fakes.flat_models import LENGTHS, VOCABULARY_SIZE
    from tests.fakes.planned_rows import PlannedRows, make_examples

    return PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3))


def _gradients(family: str, dtype: Any, *, accumulates: bool = False, fast: bool = True) -> Any:
    """Nats and all gradients of a tiny model, ours or transformers', in a type or mixed with it."""
    import torch

    from gpu_service.engine.fast_path.full_model import FullModel, FullSettings
    from tests.fakes.fast_models import nats
    from tests.fakes.flat_models import make_model

    device = torch.device("cuda", 0)
    model = make_model(family, {"sliding_window": None} if family == "mistral" else {}).to(device)
    if not fast:
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            values = nats(model, _rows(), device="cuda")
        return values.detach(), list(torch.autograd.grad(values.sum() / 100, list(model.parameters())))
    full = FullModel(model, FullSettings(device=device, compute_dtype=dtype, accumulates=accumulates))
    values = nats(full, _rows(), device="cuda")
    torch.autograd.backward(values.sum() / 100)
    flat = full.gradients.flat
    return values.detach(), [full.weights.region(one).view(flat).float() for one in model.parameters()]


def _apart(found: Any, exact: Any) -> float:
    import torch

    whole, other = (torch.cat([one.flatten() for one in part]) for part in (exact, found))
    return float((other - whole).norm() / whole.norm())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("accumulates", [True, False])
def test_models_are_those_of_transformers(family: str, accumulates: bool) -> None:
    import torch

    exact_nats, exact = _gradients(family, torch.float32, fast=False)
    _, mixed = _gradients(family, torch.bfloat16, fast=False)
    values, found = _gradients(family, torch.bfloat16, accumulates=accumulates)
    torch.testing.assert_close(values, exact_nats, rtol=0.03, atol=0.5)
    assert _apart(found, exact) < max(0.03, 1.5 * _apart(mixed, exact))


def test_steps_hold_no_synchronization() -> None:
    """From the second step on the host never waits for the device, and the same steps give the same bits."""
    import torch

    from gpu_service.engine.fast_path.full_adamw import FullAdamW
    from gpu_service.engine.fast_path.full_model import FullModel, FullSettings
    from gpu_service.engine.training.batches import collate
    from tests.fakes.flat_models import make_model
    from tunesmith.common.v1 import training_spec_pb2

    device, rows = torch.device("cuda", 0), _rows()
    batch = collate(rows.as_data(), rows.references).to(device)
    ended = []
    for _ in range(2):
        model = make_model("qwen3", {}).to(device)
        full = FullModel(model, FullSettings(device=device, compute_dtype=torch.bfloat16))
        optimizer = FullAdamW(
            full.weights, full.gradients, training_spec_pb2.Optimizer(learning_rate=1e-3, beta1=0.9, beta2=0.99,
                                                                     epsilon=1e-8))  # fmt: skip
        try:
            for number in range(4):
                torch.cuda.set_sync_debug_mode("error" if number else "default")
                optimizer.zero_grad()
                torch.autograd.backward(full.nats_by_sequence(batch).sum() / 100)
                optimizer.clip(1.0)
                optimizer.leave_out(torch.zeros((), device=device))
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ended.append(full.weights.held.clone())
    assert torch.isfinite(ended[0]).all()
    assert torch.equal(*ended)


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
@pytest.mark.parametrize("count", [256 * 40, 256 * 7 + 13])
def test_step_with_moments_of_8_bits(kind: str, count: int) -> None:
    """Three steps, so that codes are read too; a sum in another order may turn a chance over, of very few."""
    import torch

    from gpu_service.engine.fast_path import adam_8bit, adam_8bit_kernels
    from gpu_service.engine.fast_path.full_reference import AdamSettings, StepNumbers

    settings = AdamSettings(beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1)
    gradients = [torch.randn(count, device="cuda").to(torch.bfloat16) for _ in range(3)]
    start = torch.randn(count, device="cuda").to(getattr(torch, kind))
    results = []
    for module in (adam_8bit_kernels, adam_8bit):
        weights, blocks = start.clone(), -(-count // 256)
        moments = (
            torch.zeros(count, device="cuda", dtype=torch.int8),
            torch.zeros(blocks, device="cuda"),
            torch.zeros(count, device="cuda", dtype=torch.uint8),
            torch.zeros(blocks, device="cuda"),
        )
        for number, gradient in enumerate(gradients):
            # The last one is left out.
            numbers = torch.tensor([1e-2, 1.5, 0.3, float(number < 2)], device="cuda")
            module.step_adamw_8bit(weights, gradient, moments, StepNumbers(learning_rate=1e-2, numbers=numbers),
                                   settings, key=torch.tensor([number + 9], device="cuda"),
                                   first_element=2**33 + 512)  # fmt: skip
        results.append((weights, *moments))
    for found, expected in zip(*results, strict=True):
        apart = (found.float() - expected.float()).abs()
        scale = expected.float().abs().clamp(min=1e-3)
        assert float((apart > 1e-4 * scale).float().mean()) < 0.01
        # One code, or one number of the type, and no more.
        assert float(apart.max()) <= (1.0 if expected.dtype in (torch.int8, torch.uint8) else 0.04)
    assert not torch.equal(results[0][0], start)


def test_little_memory_comes_to_the_same_gradients_and_needs_no_synchronization() -> None:
    import torch

    from gpu_service.domain.recomputation import everything
    from gpu_service.engine.fast_path.consuming_adamw import ConsumingAdamW
    from gpu_service.engine.fast_path.full_low_memory import LowMemoryModel
    from gpu_service.engine.fast_path.full_model import FullModel, FullSettings
    from gpu_service.engine.training.batches import collate
    from tests.fakes.flat_models import make_model
    from tunesmith.common.v1 import training_spec_pb2

    device, rows = torch.device("cuda", 0), _rows()
    batch = collate(rows.as_data(), rows.references).to(device)
    settings = training_spec_pb2.Optimizer(learning_rate=1e-3, beta1=0.9, beta2=0.99, epsilon=1e-8)

    def make(kind: Any) -> Any:
        model = make_model("qwen3", {"tie_word_embeddings": True}).to(torch.bfloat16).to(device)
        return kind(model, FullSettings(device=device, compute_dtype=torch.bfloat16, recomputation=everything(2)))

    kept = make(FullModel)
    torch.autograd.backward(kept.nats_by_sequence(batch).sum())
    ended, losses = [], list[Any]()
    for _ in range(2):
        full = make(LowMemoryModel)
        torch.autograd.backward(full.nats_by_sequence(batch).sum())
        found: dict[int, Any] = {}
        full.sweep(lambda region, gradient, into=found: into.update({region.start: gradient.clone()}), is_last=False)
        for start, gradient in found.items():
            assert torch.equal(gradient.flatten(), kept.gradients.flat[start : start + gradient.numel()])
        optimizer = ConsumingAdamW(full, settings, seed=0)
        losses = []
        try:
            for number in range(6):
                torch.cuda.set_sync_debug_mode("error" if number else "default")
                optimizer.zero_grad()
                nats = full.nats_by_sequence(batch).sum()
                losses.append(nats.detach())
                torch.autograd.backward(nats / 100)
                optimizer.clip(1.0)
                optimizer.leave_out(torch.zeros((), device=device))
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ended.append(full.weights.held.clone())
    assert torch.equal(*ended)
    assert float(losses[-1]) < float(losses[0])
