"""Reads what Triton made of a kernel (TTGIR) for rows that are copied over while they are still multiplied."""

from __future__ import annotations

import re
from collections import Counter

_ALLOCATION = re.compile(r"(%\w+) = ttg\.local_alloc\b.*memdesc<(\d+)x\d+x\d+x")
_VIEW = re.compile(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)")
_COPY = re.compile(r"ttg\.async_copy_global_to_local %\w+, (%\w+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot (%\w+), (%\w+),.*isAsync = true")


def find_overtaken(ttgir: str) -> list[str]:
    """The buffers whose copies overtake products, in words; empty where there is none.

    Hopper's products (wgmma) read shared memory in the background. A loop that copies N steps ahead writes, in the step
    in which a product is begun, what is needed N steps later: with only N buffers that is the place which the product
    reads. Triton has one buffer more there, except where rows go into registers as well, for another use.
    """
    buffers: dict[str, int] = {}
    views: dict[str, str] = {}
    copies: Counter[tuple[str, bool]] = Counter()
    multiplied: set[str] = set()
    loops: list[int] = []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while loops and indent <= loops[-1]:
            loops.pop()
        if found := _ALLOCATION.search(line):
            buffers[found[1]] = int(found[2])
        elif found := _VIEW.search(line):
            views[found[1]] = views.get(found[2], found[2])
        elif found := _COPY.search(line):
            copies[views.get(found[1], found[1]), bool(loops)] += 1
        elif (found := _PRODUCT.search(line)) and loops:
            multiplied |= {views.get(operand, operand) for operand in found.groups()}
        if " = scf.for " in line:
            loops.append(indent)
    return [
        f"{name} has {buffers[name]} buffers and is copied {copies[name, False]} steps ahead"
        for name in sorted(multiplied & buffers.keys())
        if copies[name, True] and buffers[name] <= copies[name, False]
    ]
