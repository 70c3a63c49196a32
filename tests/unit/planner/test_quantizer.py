"""Who quantizes: the engine's own code where it was compared with the library, and the library everywhere else."""

from __future__ import annotations

import pytest

from gpu_service.domain.device import Device
from gpu_service.domain.quantizer import TESTED_VERSIONS, choose_quantizer

TESTED = {"bitsandbytes": TESTED_VERSIONS[0]}


@pytest.mark.parametrize(
    ("method", "trainer", "device_type", "versions", "quantizer"),
    [
        ("nf4", "fast", "cpu", TESTED, "own"),
        ("nf4", "fast", "cuda", TESTED, "bitsandbytes"),
        ("nf4", "reference", "cuda", TESTED, "bitsandbytes"),
        ("nf4", "", "cuda", TESTED, "bitsandbytes"),
        ("nf4", "fast", "cpu", {"bitsandbytes": "0.99.0"}, "bitsandbytes"),
        ("nf4", "fast", "cpu", {}, "bitsandbytes"),
        ("fp4", "reference", "cuda", TESTED, "bitsandbytes"),
        ("none", "fast", "cuda", TESTED, ""),
    ],
)
def test_who_quantizes(method: str, trainer: str, device_type: str, versions: dict[str, str], quantizer: str) -> None:
    device = Device(type=device_type, name=device_type)
    found = choose_quantizer(method, trainer=trainer, device=device, versions=versions)
    assert found == quantizer
