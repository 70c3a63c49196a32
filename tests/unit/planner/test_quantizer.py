"""Who quantizes: the engine's own code where it was compared with the library, and the library everywhere else."""

from __future__ import annotations

import pytest

from gpu_service.domain.device import Device
from gpu_service.domain.quantizer import TESTED_VERSIONS, choose_quantizer

TESTED = {"bitsandbytes": TESTED_VERSIONS[0]}


@pytest.mark.parametrize(
    ("method", "trainer", "compute_dtype", "device_type", "versions", "quantizer"),
    [
        ("nf4", "fast", "bfloat16", "cuda", TESTED, "own"),
        ("nf4", "fast", "float32", "cpu", TESTED, "own"),
        ("nf4", "fast", "float32", "cuda", TESTED, "bitsandbytes"),
        ("nf4", "reference", "bfloat16", "cuda", TESTED, "bitsandbytes"),
        ("nf4", "", "bfloat16", "cuda", TESTED, "bitsandbytes"),
        ("nf4", "fast", "bfloat16", "cuda", {"bitsandbytes": "0.99.0"}, "bitsandbytes"),
        ("nf4", "fast", "bfloat16", "cuda", {}, "bitsandbytes"),
        ("fp4", "reference", "bfloat16", "cuda", TESTED, "bitsandbytes"),
        ("none", "fast", "bfloat16", "cuda", TESTED, ""),
    ],
)
def test_who_quantizes(
    method: str, trainer: str, compute_dtype: str, device_type: str, versions: dict[str, str], quantizer: str
) -> None:
    device = Device(type=device_type, name=device_type)
    found = choose_quantizer(method, compute_dtype=compute_dtype, trainer=trainer, device=device, versions=versions)
    assert found == quantizer
