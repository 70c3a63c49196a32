"""What a driver is asked, and what its answers are called; the driver is played."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from gpu_service import torch_build
from gpu_service.engine.device_facts import DriverFailed, open_device
from gpu_service.engine.request import DeviceChoice


class _Driver:
    """Functions as the driver's: what they give lies behind the pointers, and a status is returned."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[str] = []
        self._failing = failing

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self._failing:
                return 999
            self._answer(name, arguments)
            return 0

        return call

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "cuDeviceGet":
            arguments[0]._obj.value = arguments[1]
        elif name == "cuMemGetInfo_v2":
            arguments[0]._obj.value, arguments[1]._obj.value = 70 << 30, 80 << 30
        elif name == "cuDeviceGetName":
            arguments[0].value = b"a card"
        elif name == "cuDeviceGetAttribute":
            arguments[0]._obj.value = {75: 9, 76: 0}[arguments[1]]
            assert arguments[2].value == 1


def test_a_gpu_is_described_with_its_context_made() -> None:
    driver = _Driver()
    describe = open_device(DeviceChoice(type="cuda", index=1), load_driver={"libcuda.so.1": driver}.__getitem__)
    assert driver.calls == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    device = describe()
    # Another thread than the one that made the context may ask.
    assert driver.calls[3:5] == ["cuCtxSetCurrent", "cuMemGetInfo_v2"]
    assert device.pop("host_memory_bytes") > 0
    assert device == {
        "type": "cuda",
        "name": "a card",
        "total_memory_bytes": 80 << 30,
        "free_memory_bytes": 70 << 30,
        "compute_capability": "9.0",
    }


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_a_driver_that_fails_gives_no_facts(failing: str) -> None:
    with pytest.raises(DriverFailed, match=f"{failing} gave 999"):
        open_device(DeviceChoice(type="cuda", index=0), load_driver=lambda name: _Driver(failing))


def test_a_machine_without_the_driver_says_so() -> None:
    def load(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: no such file")

    with pytest.raises(OSError, match=r"libcuda\.so\.1"):
        open_device(DeviceChoice(type="cuda", index=0), load_driver=load)


def test_a_kind_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="abacus"):
        open_device(DeviceChoice(type="abacus"))


def test_the_machine_itself_is_a_device() -> None:
    device = open_device(DeviceChoice(type="cpu"))()
    assert (device["type"], device["name"]) == ("cpu", "cpu")
    assert device["total_memory_bytes"] >= device["free_memory_bytes"] > 0
    assert device["has_cuda_build"] is torch_build.has_cuda()


def test_a_build_for_cuda_is_known_by_its_library(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cpu.so").touch()
    assert not torch_build.has_cuda_library(tmp_path)
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    assert torch_build.has_cuda_library(tmp_path)
