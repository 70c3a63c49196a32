"""The engine's own reader on a CUDA device: kernels against their reference, models against the library's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from gpu_service.engine.reading import flat_nf4, piece_digests, prequantized, reader

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    monkeypatch.setattr(prequantized, "SMALLEST_BYTES", 0)
    # Tiny tensors have many pieces then.
    for module in (reader, piece_digests, prequantized, flat_nf4):
        monkeypatch.setattr(module, "PIECE_BYTES", 1024)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_weights", [64, 64 * 999, 8192 * 3072])
def test_kernels_are_their_reference_but_for_values_at_a_bound(dtype: str, num_weights: int) -> None:
    """The device's reciprocals are approximate: a value within their last bit of a bound may have the next code."""
    import torch

    from gpu_service.engine.fast_path import quantizing, quantizing_kernels

    tables = quantizing.Tables.on(torch.device("cuda"))
    values = (torch.randn(num_weights, device="cuda") * 0.02).to(getattr(torch, dtype))
    values[:32] = 0
    values[64 * 7 : 64 * 8] = 0
    results = []
    for module, suffix in ((quantizing_kernels, ""), (quantizing, "_reference")):
        packed = torch.empty(num_weights // 2, dtype=torch.uint8, device="cuda")
        scales = torch.empty(num_weights // 64, device="cuda")
        getattr(module, f"quantize_values{suffix}")(values, tables.bounds, packed, scales)
        offset = scales.mean()
        places = torch.empty(len(scales), dtype=torch.uint8, device="cuda")
        nested = torch.empty(-(-len(scales) // 256), device="cuda")
        getattr(module, f"quantize_scales{suffix}")(scales, offset, tables.nested_bounds, places, nested)
        results.append((packed, scales, places, nested))
    (packed, scales, places, nested), expected = results
    assert torch.equal(scales, expected[1])
    assert torch.equal(nested, expected[3])
    apart = [(packed >> shift & 15).int() - (expected[0] >> shift & 15).int() for shift in (0, 4)]
    for differences in (*apart, places.int() - expected[2].int()):
        assert differences.abs().max() <= 1
        assert differences.count_nonzero() <= max(1, 1e-5 * differences.numel())


def test_values_on_a_bound_have_the_librarys_codes() -> None:
    """Between any two codes, exactly: below or above is a matter of how one searches."""
    import torch
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    from gpu_service.engine.fast_path import quantizing, quantizing_kernels

    device = torch.device("cuda")
    tables = quantizing.Tables.on(device)
    codes = quantizing.nested_codes(device)
    bounds = (codes[:-1] + codes[1:]) / 2
    values = torch.cat([bounds, torch.ones(1, device=device)])
    expected, _ = quantize_blockwise(values, code=codes, blocksize=256)
    places, nested = torch.empty(256, dtype=torch.uint8, device=device), torch.empty(1, device=device)
    no_offset = torch.zeros((), device=device)
    quantizing_kernels.quantize_scales(values, no_offset, tables.nested_bounds, places, nested)
    assert torch.equal(places, expected)

    around = [torch.nextafter(tables.bounds, torch.full((), limit, device=device)) for limit in (-2.0, 2.0)]
    values = torch.cat([tables.bounds, *around, torch.zeros(18, device=device), torch.ones(1, device=device)])
    packed, _ = quantize_4bit(values[None], quant_type="nf4", compress_statistics=False)
    found = quantizing.quantize(values[None], double=False)
    assert torch.equal(found.packed, packed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_many_matrices_are_the_librarys_bit_for_bit(dtype: str) -> None:
    """Values that lie on a bound are rare: one of them is in a billion weights, or none."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    from gpu_service.engine.fast_path import quantizing

    for number in range(60):
        deviation = 0.02 * (1 + number / 7)
        weight = (torch.randn(8192, 4096, device="cuda") * deviation).to(getattr(torch, dtype))
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        found: Any = quantizing.quantize(weight, double=True)
        assert torch.equal(found.packed, packed)
        assert torch.equal(found.offset, state.offset)
        assert torch.equal(found.nested_scales, state.state2.absmax)
        assert torch.equal(found.scales, state.absmax)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_model_is_the_librarys_bit_for_bit(family: str, double: bool, tmp_path: Path) -> None:
    from tests.fakes.base_loading import load_base, same
    from tests.fakes.tiny_models import TinyOptions, place

    directory = tmp_path / place(tmp_path, TinyOptions(family=family, tied=True, sharded=True))
    settings: dict[str, Any] = {"model_type": family, "double": double, "device": "cuda:0"}
    expected, _ = load_base(directory, cache=None, quantizer="bitsandbytes", **settings)
    for source in ("files", "the 4-bit copy"):
        found, details = load_base(directory, cache=tmp_path / "cache", **settings)
        assert details["read_from"] == source
        same(found.base, expected.base)


@pytest.mark.parametrize("training_type", ["lora", "full"])
def test_plain_models_are_the_librarys_too(training_type: str, tmp_path: Path) -> None:
    from tests.fakes.base_loading import load_base, same
    from tests.fakes.tiny_models import TinyOptions, place

    directory = tmp_path / place(tmp_path, TinyOptions(sharded=True))
    settings: dict[str, Any] = {"method": "none", "training_type": training_type, "quantizer": ""}
    expected, _ = load_base(directory, cache=None, **settings)
    found, details = load_base(directory, cache=tmp_path / "cache", device="cuda:0", **settings)
    assert "reader_threads" in details
    found.base.to("cpu")
    same(found.base, expected.base)
