"""Imports of libraries that hand functions to torch.compile as they are imported, without what that drags in.

bitsandbytes does so with the fallbacks of its kernels, which a device that has kernels never calls; torch.compile
itself imports torch._dynamo and torch._inductor, which takes seconds. Within the block it gives back a function that is
compiled by the real one when it is first called. Afterwards torch is as it was. torch hides some of its own functions
from the compiler and imports it for that when they are first called; `unhidden` has them called as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# The attribute in which torch keeps it.
_KEPT = "__dynamo_disable"


@contextmanager
def compiling_at_first_call() -> Iterator[None]:
    """For import statements alone. Imports torch."""
    import torch

    compile_now = torch.compile

    def compile_later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return lambda decorated: compile_later(decorated, **options)
        if isinstance(model, torch.nn.Module):
            return compile_now(model, **options)
        return _deferred(model, functools.partial(compile_now, **options))

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now


def unhidden(owner: type, names: Iterable[str]) -> None:
    """Have torch call these of its functions without looking for a compiler that would have to be kept from them.

    It keeps what it calls with each of them, made at the first call; here that is the function itself. A torch that
    keeps it elsewhere, or that has it already, goes on as it is.
    """
    for name in names:
        function = getattr(getattr(owner, name), "__wrapped__", None)
        if function is not None and not hasattr(function, _KEPT):
            setattr(function, _KEPT, function)


def _deferred(function: Callable[..., Any], compile_now: Callable[..., Any]) -> Callable[..., Any]:
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if not compiled:
            compiled.append(compile_now(function))
        return compiled[0](*arguments, **options)

    return call
