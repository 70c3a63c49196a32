"""Has torch's shared libraries loaded by a thread of the system's linker, while Python imports what needs none of them.

An import statement holds the interpreter for as long as the linker works, seconds for torch's libraries. Loaded here in
the same order and in the same way as torch does it first, they are found when torch is imported. Only those that know
nothing of Python are: what they do when they are loaded needs no interpreter. Refuses to fail: what cannot be loaded is
torch's to say.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_LOG = logging.getLogger(__name__)
# As torch opens the first, and as the interpreter opens what lies behind torch's extension.
TORCH_LIBRARIES = (
    ("libtorch_global_deps.so", os.RTLD_NOW | os.RTLD_GLOBAL),
    ("libtorch.so", os.RTLD_NOW | os.RTLD_LOCAL),
)


def load_ahead(libraries: Sequence[tuple[str, int]] = TORCH_LIBRARIES) -> threading.Thread:
    """The thread that loads them, begun; it ends at the first that cannot be loaded."""
    thread = threading.Thread(target=_load, args=(libraries,), name="shared-libraries", daemon=True)
    thread.start()
    return thread


def _load(libraries: Sequence[tuple[str, int]]) -> None:
    # Finds the package without importing it.
    found = find_spec("torch")
    if found is None or found.origin is None:
        return
    directory = Path(found.origin).parent / "lib"
    # Called as any function of C, it leaves the interpreter to others; `ctypes.CDLL` would not.
    open_library = ctypes.CDLL(None).dlopen
    open_library.restype, open_library.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    for name, mode in libraries:
        if not open_library(os.fsencode(directory / name), mode):
            _LOG.info("%s is not loaded ahead", name)
            return
    _LOG.info("torch's libraries are loaded")
