"""What a checkpoint promises of the training that goes on from it, and whether a resumed training keeps the promise.

A certificate is measured on the living model and optimizer before they are written, and again after they were read:
file hashes say that the bytes are the same, a certificate that what was made of them is. Reads and writes no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gpu_service.engine.failures import library_versions
from gpu_service.engine.pace import NOBODY, Pace
from gpu_service.engine.training.optimizer_state import digest_of_optimizer, digest_of_tensors

# How far apart the losses of the probe may lie, in nats per target token, or as a part of a loss above 1, where not
# every addition is made in the same order: another device, trainer or library version, more than one thread.
_TOLERANCE: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}
_QUANTIZED_TOLERANCE = 2e-2


class CertificateBroken(Exception):
    """What was measured is not what was saved. `what` is a field of `Certificate`."""

    def __init__(self, what: str, saved: str, measured: str, tolerance: float = 0.0) -> None:
        allowed = f" (allowed difference {tolerance:g})" if tolerance else ""
        super().__init__(f"{what} was {saved} and is {measured}{allowed}")
        self.what = what
        self.saved = saved
        self.measured = measured
        self.tolerance = tolerance


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a certificate was measured, as far as sums depend on it."""

    device: str
    device_name: str
    threads: int
    compute_dtype: str
    quantization: str
    versions: Mapping[str, str]
    # Each of them adds up in an order of its own; empty in a certificate of a version that did not say.
    trainer: str = ""

    @property
    def repeats_exactly(self) -> bool:
        """On one thread of a CPU every sum is made in one order."""
        return self.device == "cpu" and self.threads == 1

    @classmethod
    def here(cls, *, device: torch.device, compute_dtype: str, quantization: str, trainer: str = "") -> Environment:
        """Of this process and `device`."""
        is_cuda = device.type == "cuda"
        return cls(
            device=device.type,
            device_name=torch.cuda.get_device_name(device) if is_cuda else torch.backends.cpu.get_cpu_capability(),
            threads=torch.get_num_threads(),
            compute_dtype=compute_dtype,
            quantization=quantization,
            versions=library_versions(),
            trainer=trainer,
        )


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """`probe_loss` is None when it was not a finite number; digests are of what model and optimizer held."""

    probe_loss: float | None
    weights_sha256: str
    optimizer_sha256: str
    environment: Environment

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Certificate:
        """Raises KeyError, TypeError for what `to_json` did not write."""
        environment = Environment(**document["environment"])
        return cls(**{**document, "environment": environment})

    def compare(self, measured: Certificate) -> None:
        """Raise CertificateBroken when `measured` differs: digests by a bit, the probe's loss by the tolerance."""
        for what in ("weights_sha256", "optimizer_sha256"):
            ours, theirs = getattr(self, what), getattr(measured, what)
            if ours != theirs:
                raise CertificateBroken(what, ours, theirs)
        tolerance = self.tolerance(measured.environment)
        if not _is_close(self.probe_loss, measured.probe_loss, tolerance):
            raise CertificateBroken("probe_loss", repr(self.probe_loss), repr(measured.probe_loss), tolerance)

    def tolerance(self, environment: Environment) -> float:
        """How far a probe measured in `environment` may lie off; 0 where both were made in the same order."""
        if environment == self.environment and environment.repeats_exactly:
            return 0.0
        both = (environment, self.environment)
        if any(one.quantization != "none" for one in both):
            return _QUANTIZED_TOLERANCE
        return max(_TOLERANCE[one.compute_dtype] for one in both)


def _is_close(saved: float | None, measured: float | None, tolerance: float) -> bool:
    if saved is None or measured is None:
        return saved is measured
    return abs(saved - measured) <= tolerance * max(1.0, abs(saved))


def measure(
    *, model: Any, optimizer: Any, probe_loss: float | None, environment: Environment, pace: Pace = NOBODY
) -> Certificate:
    """The certificate of what `model` and `optimizer` hold now."""
    return Certificate(
        probe_loss=probe_loss,
        weights_sha256=digest_of_tensors(dict(trained_tensors(model)), pace),
        optimizer_sha256=digest_of_optimizer(optimizer, pace),
        environment=environment,
    )


def trained_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every parameter that is trained."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter.detach()
