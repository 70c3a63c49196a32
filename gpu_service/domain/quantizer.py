"""Who turns a base's weights into 4 bits: this engine's own code, or bitsandbytes. Pure.

Its own is for the fast path and for answers, and gives the same bits as the versions of bitsandbytes that tests
compared it with. Beside any other version, and on the reference path always, it is bitsandbytes.
"""

from collections.abc import Mapping

OWN, LIBRARY = "own", "bitsandbytes"
# Versions that tests compared, bit for bit (tests/integration/engine, tests/gpu).
TESTED_VERSIONS = ("0.50.2",)
_METHOD, _FAST_PATH = "nf4", "fast"
_NONE = "none"


def choose_quantizer(method: str, *, trainer: str, versions: Mapping[str, str]) -> str:
    """`own` or `bitsandbytes`; empty where nothing is quantized. `versions` are installed distributions by name."""
    if method == _NONE:
        return ""
    is_own = method == _METHOD and trainer == _FAST_PATH and versions.get("bitsandbytes") in TESTED_VERSIONS
    return OWN if is_own else LIBRARY
