"""Who turns a base's weights into 4 bits: this engine's own code, or bitsandbytes. Pure.

Its own is for the fast path and for answers, and gives the same bits as the versions of bitsandbytes that tests
compared it with. Beside any other version, and on the reference path always, it is bitsandbytes.
"""

from collections.abc import Mapping

from gpu_service.domain.device import Device

OWN, LIBRARY = "own", "bitsandbytes"
# Versions that tests compared, bit for bit (tests/integration/engine, tests/gpu).
TESTED_VERSIONS = ("0.50.2",)
_METHOD, _FAST_PATH = "nf4", "fast"
_NONE = "none"


def choose_quantizer(
    method: str, *, compute_dtype: str, trainer: str, device: Device, versions: Mapping[str, str]
) -> str:
    """`own` or `bitsandbytes`; empty where nothing is quantized. `versions` are installed distributions by name.

    Weights in float32 on CUDA are the library's: not all of their bits were the same.
    """
    if method == _NONE:
        return ""
    is_own = (
        method == _METHOD
        and trainer == _FAST_PATH
        and versions.get("bitsandbytes") in TESTED_VERSIONS
        and not (device.type == "cuda" and compute_dtype == "float32")
    )
    return OWN if is_own else LIBRARY
