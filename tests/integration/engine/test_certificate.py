"""When a certificate holds: digests by the bit, the probe's loss exactly or within what its surroundings allow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gpu_service.engine.builders.optimizers import adamw, adamw_8bit
from gpu_service.engine.training import optimizer_state
from gpu_service.engine.training.certificate import Certificate, CertificateBroken, Environment
from tunesmith.common.v1 import training_spec_pb2

HERE = Environment(
    device="cpu",
    device_name="AVX2",
    threads=1,
    compute_dtype="float32",
    quantization="none",
    versions={"torch": "2.13.0"},
)
CERTIFICATE = Certificate(probe_loss=2.0, weights_sha256="a", optimizer_sha256="b", environment=HERE)


def _measured(difference: float, **changes: Any) -> Certificate:
    return replace(CERTIFICATE, probe_loss=2.0 + difference, environment=replace(HERE, **changes))


@pytest.mark.parametrize(
    ("changes", "allowed", "refused"),
    [
        ({}, 0.0, 1e-12),
        ({"threads": 8}, 1e-3, 3e-3),
        ({"trainer": "fast"}, 1e-3, 3e-3),
        ({"versions": {"torch": "2.14.0"}}, 1e-3, 3e-3),
        ({"device": "cuda", "device_name": "H100"}, 1e-3, 3e-3),
        ({"device": "cuda", "compute_dtype": "bfloat16"}, 3e-2, 5e-2),
        ({"device": "cuda", "quantization": "nf4"}, 3e-2, 5e-2),
    ],
)
def test_how_far_the_probe_may_lie_off(changes: dict[str, Any], allowed: float, refused: float) -> None:
    for sign in (1, -1):
        CERTIFICATE.compare(_measured(sign * allowed, **changes))
        with pytest.raises(CertificateBroken) as broken:
            CERTIFICATE.compare(_measured(sign * refused, **changes))
        assert (broken.value.what, broken.value.saved) == ("probe_loss", "2.0")
        assert float(broken.value.measured) == 2.0 + sign * refused


def test_two_runs_on_a_gpu_need_not_be_equal() -> None:
    on_gpu = replace(CERTIFICATE, environment=replace(HERE, device="cuda"))
    on_gpu.compare(_measured(1e-4, device="cuda"))
    assert on_gpu.tolerance(on_gpu.environment) == 1e-3
    with pytest.raises(CertificateBroken):
        on_gpu.compare(_measured(3e-3, device="cuda"))


@pytest.mark.parametrize("what", ["weights_sha256", "optimizer_sha256"])
def test_digests_are_exact_everywhere(what: str) -> None:
    changed: dict[str, Any] = {what: "c"}
    with pytest.raises(CertificateBroken) as broken:
        CERTIFICATE.compare(replace(_measured(0.0, device="cuda"), **changed))
    assert broken.value.what == what


def test_a_probe_that_is_not_finite_stays_so() -> None:
    lost = replace(CERTIFICATE, probe_loss=None)
    lost.compare(lost)
    with pytest.raises(CertificateBroken):
        lost.compare(CERTIFICATE)
    with pytest.raises(CertificateBroken):
        CERTIFICATE.compare(lost)


def test_json_gives_it_back() -> None:
    assert Certificate.from_json(CERTIFICATE.to_json()) == CERTIFICATE


@pytest.mark.parametrize("builder", [adamw, adamw_8bit])
def test_optimizer_state_comes_back_whole(builder: Any) -> None:
    """Also what is nested, what several parameters share, and counters; then both step alike."""
    settings = training_spec_pb2.Optimizer(learning_rate=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.999, epsilon=1e-8)

    def make() -> tuple[list[torch.nn.Parameter], Any]:
        torch.manual_seed(1)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 64), (64, 128), (8, 8), (16,))]
        return parameters, builder.build(parameters, settings)

    def step(parameters: list[torch.nn.Parameter], optimizer: Any) -> None:
        for parameter in parameters:
            parameter.grad = parameter.detach().sin()
        optimizer.step()

    parameters, optimizer = make()
    for _ in range(3):
        step(parameters, optimizer)
    state = optimizer_state.flatten(optimizer)
    tensors = {name: tensor.clone() for name, tensor in optimizer_state.apart(state.tensors).items()}
    assert len({tensor.data_ptr() for tensor in optimizer_state.apart(state.tensors).values()}) == len(tensors)
    again, fresh = make()
    cold = optimizer_state.digest_of_optimizer(fresh)
    optimizer_state.load(fresh, state.document(), tensors)
    for parameter, other in zip(again, parameters, strict=True):
        parameter.data.copy_(other.data)

    digest = optimizer_state.digest_of_optimizer(optimizer)
    assert optimizer_state.digest_of_optimizer(fresh) == digest != cold
    step(parameters, optimizer)
    step(again, fresh)
    assert optimizer_state.digest_of_optimizer(fresh) == optimizer_state.digest_of_optimizer(optimizer) != digest
    assert all(torch.equal(one, other) for one, other in zip(again, parameters, strict=True))


def test_any_bit_of_a_moment_is_in_the_digest() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    settings = training_spec_pb2.Optimizer(learning_rate=1e-2, beta1=0.9, beta2=0.999, epsilon=1e-8)
    optimizer = adamw.build([parameter], settings)
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    before = optimizer_state.digest_of_optimizer(optimizer)
    moment = optimizer.state[parameter]["exp_avg_sq"]
    moment.view(-1).view(torch.int32)[-1] ^= 1
    assert optimizer_state.digest_of_optimizer(optimizer) != before
