"""Which compiled kernel is launched again, and which launches find another one."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from gpu_service.engine.fast_path.launching import Launched


@dataclass(frozen=True)
class Pointer:
    dtype: str = "bfloat16"
    address: int = 4096

    def data_ptr(self) -> int:
        return self.address


@dataclass
class Function:
    """Compiles a kernel at every launch, as Triton does for arguments of a new kind."""

    arg_names: tuple[str, ...] = ("x", "row", "factor", "WIDTH", "ADDS")
    compiled: list[Any] = field(default_factory=list)
    launched: list[Any] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.compiled.append((grid, arguments, constants))
            return Compiled(number=len(self.compiled) - 1, launched=self.launched)

        return run


@dataclass
class Compiled:
    number: int
    launched: list[Any]

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.launched.append((self.number, grid, arguments))


@pytest.fixture
def function() -> Function:
    return Function()


def test_second_launch_hands_over_everything_in_the_order_of_the_signature(function: Function) -> None:
    kernel = Launched(function, lambda: 0)
    kernel[(7,)](Pointer(), 48, 0.5, ADDS=True, WIDTH=8, num_warps=4)
    other = Pointer(address=64)
    kernel[(9, 2)](other, 96, 0.25, ADDS=True, WIDTH=8, num_warps=4)
    assert len(function.compiled) == 1
    assert function.launched == [(0, (9, 2, 1), (other, 96, 0.25, 8, True))]


@pytest.mark.parametrize(
    ("arguments", "constants"),
    [
        ((Pointer(dtype="float32"), 48, 0.5), {}),
        ((Pointer(address=4097), 48, 0.5), {}),
        ((Pointer(), 49, 0.5), {}),
        ((Pointer(), 1, 0.5), {}),
        ((Pointer(), 2**31, 0.5), {}),
        ((Pointer(), 48, None), {}),
        ((Pointer(), 48, 0.5), {"WIDTH": 9}),
        ((Pointer(), 48, 0.5), {"num_warps": 8}),
    ],
    ids=["type", "place", "odd number", "one", "long number", "nothing", "constant", "option"],
)
def test_another_kind_of_launch_is_found_anew(
    function: Function, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    kernel = Launched(function, lambda: 0)
    usual = {"WIDTH": 8, "ADDS": True, "num_warps": 4}
    kernel[(7,)](Pointer(), 48, 0.5, **usual)
    kernel[(7,)](*arguments, **{**usual, **constants})
    assert (len(function.compiled), function.launched) == (2, [])
    kernel[(7,)](Pointer(), 32, 1.5, **usual)
    assert [number for number, *_ in function.launched] == [0]


def test_each_device_has_its_own(function: Function) -> None:
    devices = iter([0, 1, 0])
    kernel = Launched(function, lambda: next(devices))
    for _ in range(3):
        kernel[(7,)](Pointer(), 48, 0.5, WIDTH=8, ADDS=True)
    assert len(function.compiled) == 2
    assert [number for number, *_ in function.launched] == [0]


def test_what_does_not_compile_is_not_remembered() -> None:
    class Failing(Function):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            raise RuntimeError("no compiler")

    kernel = Launched(Failing(), lambda: 0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no compiler"):
            kernel[(7,)](Pointer(), 48, 0.5, WIDTH=8, ADDS=True)
