"""What the installed torch was built for, from its files: it is not imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

# Of every build for CUDA, whichever index it comes from; PyPI's of Linux is one.
_CUDA_LIBRARY = "libtorch_cuda.so"


def has_cuda() -> bool:
    """Whether it is a build for CUDA: its libraries are loaded, and take memory, on a machine without a GPU too."""
    found = find_spec("torch")
    return found is not None and found.origin is not None and has_cuda_library(Path(found.origin).parent)


def has_cuda_library(package: Path) -> bool:
    """Of the package in this directory."""
    return (package / "lib" / _CUDA_LIBRARY).exists()
