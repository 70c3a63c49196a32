"""Launches Triton's kernels with less of the host's time than Triton's own way takes.

Triton finds out at each launch which compiled kernel the arguments ask for, by way of options, environment variables
and names of everything. What it found is kept here by what it depends on, and launched by itself the next time, as
Triton's tutorials launch a kernel that was compiled ahead (`kernel[grid](*arguments)`). Compiles nothing itself.

Source of what a compiled kernel depends on: Triton's specialization of arguments (a pointer's type, and whether it is a
multiple of 16; a whole number that is 1, or a multiple of 16, or needs 64 bits) and every `tl.constexpr`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Beyond it a whole number is handed over in 64 bits.
_LARGEST_INT32 = 2**31 - 1
_ALIGNED = 16


def kernel(function: Any) -> Any:
    """`triton.jit`, launched by way of `Launched`. Helpers that kernels call stay `triton.jit` alone."""
    import torch
    import triton

    jitted = triton.jit(function)
    # Triton's interpreter compiles nothing that could be kept.
    return Launched(jitted, torch.cuda.current_device) if isinstance(jitted, triton.JITFunction) else jitted


class Launched:
    """Use as `triton.jit`'s result: `self[grid](*arguments, **constants)`.

    What goes by name is a `tl.constexpr` or a number of which there are few: each value is looked up by itself.
    """

    def __init__(self, function: Any, current_device: Callable[[], int]) -> None:
        """`current_device` is the number of the device that Triton launches on."""
        self._function = function
        self._current_device = current_device
        # Compiled kernels, and the constants' names in the order in which they are handed over.
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}

    @property
    def name(self) -> str:
        return str(self._function.__name__)

    def compiled(self) -> list[Any]:
        """Triton's compiled kernels, of every kind of arguments so far."""
        return [compiled for compiled, _ in self._compiled.values()]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self._launch(grid, arguments, constants)

    def _launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        key = (self._current_device(), *map(_kind, arguments), *constants.items())
        known = self._compiled.get(key)
        if known is None:
            compiled = self._function[grid](*arguments, **constants)
            self._compiled[key] = compiled, tuple(self._function.arg_names[len(arguments) :])
            return
        compiled, names = known
        whole = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        compiled[whole](*arguments, *[constants[name] for name in names])


def _kind(argument: Any) -> Any:
    """What of an argument decides which compiled kernel is launched, and nothing that decides less than that."""
    if hasattr(argument, "data_ptr"):
        return argument.dtype, argument.data_ptr() % _ALIGNED == 0
    if type(argument) is int:
        return argument == 1, argument % _ALIGNED == 0, -_LARGEST_INT32 <= argument <= _LARGEST_INT32
    # Floats are never specialized; whatever else there is (None, truth values) is all that it is.
    return float if type(argument) is float else (type(argument), argument)
