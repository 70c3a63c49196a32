"""Devices as a fake NVML has them, seen through CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from gpu_service.devices import list_devices

GIB = 1 << 30


class FakeNvml:
    """Three GPUs in the order of their bus ids; `broken` do not answer."""

    def __init__(self, *, count: int = 3, broken: tuple[int, ...] = (), counts: bool = True) -> None:
        self._count = count
        self._broken = broken
        self._counts = counts
        self.num_open = 0

    def nvmlInit(self) -> None:  # noqa: N802 - the library's names
        self.num_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        if not self._counts:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
        return self._count

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:  # noqa: N802
        if number in self._broken:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        assert 0 <= number < self._count
        return number

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return f"gpu {handle}".encode()

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}abc-0000"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=80 * GIB, free=(handle + 1) * GIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:  # noqa: N802
        return 9, 0


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["gpu 0", "gpu 1", "gpu 2"]),
        ("1", ["gpu 1"]),
        (" 2, 0 ", ["gpu 2", "gpu 0"]),
        # CUDA stops at the first entry that names no device.
        ("2,7,0", ["gpu 2"]),
        ("1,1", ["gpu 1"]),
        ("GPU-2ab,GPU-0abc-0000", ["gpu 2", "gpu 0"]),
    ],
)
def test_devices_are_those_that_an_engine_sees_and_numbered_as_it_does(
    visible: str | None, expected: list[str]
) -> None:
    nvml = FakeNvml()
    devices = list_devices(nvml=nvml, environment={} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert [device.name for device in devices] == expected
    assert [device.id for device in devices] == [f"cuda:{index}" for index in range(len(expected))]
    assert all(device.free_memory_bytes == (int(device.name[-1]) + 1) * GIB for device in devices)
    assert nvml.num_open == 0


@pytest.mark.parametrize("visible", ["", "-1", "none"])
def test_hidden_gpus_make_a_cpu_node(visible: str) -> None:
    [device] = list_devices(nvml=FakeNvml(), environment={"CUDA_VISIBLE_DEVICES": visible})
    assert (device.id, device.quarantine_reason) == ("cpu:-1", "")


@pytest.mark.parametrize("visible", ["7", "MIG-1", "GPU-", "GPU-ffff", "gpu"])
def test_a_wrong_name_never_falls_back_to_the_cpu(visible: str) -> None:
    [device] = list_devices(nvml=FakeNvml(), environment={"CUDA_VISIBLE_DEVICES": visible})
    assert device.type == "cuda"
    assert visible in device.quarantine_reason


def test_a_driver_that_fails_is_a_quarantined_device() -> None:
    nvml = FakeNvml(counts=False)
    [device] = list_devices(nvml=nvml, environment={})
    assert "does not answer" in device.quarantine_reason
    assert nvml.num_open == 0
    lost, well = list_devices(nvml=FakeNvml(broken=(1,)), environment={"CUDA_VISIBLE_DEVICES": "1,GPU-2"})
    assert (lost.index, well.index, well.name) == (0, 1, "gpu 2")
    assert lost.quarantine_reason
    assert not well.quarantine_reason
    assert list_devices(nvml=FakeNvml(count=0), environment={})[0].type == "cpu"
