"""Who quantizes: the engine's own code where it was compared with the library, and the library everywhere else."""

from __future__ import annotations

import pytest

from gpu_service.domain.quantizer import TESTED_VERSIONS, choose_quantizer

TESTED = {"bitsandbytes": TESTED_VERSIONS[0]}


@pytest.mark.parametrize(
    ("method", "trainer", "versions", "quantizer"),
    [
        ("nf4", "fast", TESTED, "own"),
        ("nf4", "reference", TESTED, "bitsandbytes"),
        ("nf4", "", TESTED, "bitsandbytes"),
        ("nf4", "fast", {"bitsandbytes": "0.99.0"}, "bitsandbytes"),
        ("nf4", "fast", {}, "bitsandbytes"),
        ("fp4", "reference", TESTED, "bitsandbytes"),
        ("none", "fast", TESTED, ""),
    ],
)
def test_who_quantizes(method: str, trainer: str, versions: dict[str, str], quantizer: str) -> None:
    assert choose_quantizer(method, trainer=trainer, versions=versions) == quantizer
