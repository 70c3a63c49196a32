"""Reads what Triton made of a kernel (TTGIR) for rows that are copied over while they are still multiplied."""

from __future__ import annotations

import re
from collections import Counter

_ALLOCATION = re.compile(r"(%\w+) = ttg\.local_alloc\b.*memdesc<(\d+)x\d+x\d+x")
_VIEW = re.compile(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)")
_COPY = re.compile(r"ttg\.async_copy_global_to_local %\w+, (%\w+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot (%\w+), (%\w+),.*isAsync = true")
_WAITED_FOR = re.compile(r"ttng\.warp_group_dot_wait .*pendings = 0 ")


def find_overtaken(ttgir: str) -> list[str]:
    """The buffers whose copies overtake products, in words; empty where there is none.

    Hopper's products (wgmma) read shared memory in the background. A loop that copies N steps ahead writes, in the step
    in which a product is begun, what is needed N steps later: with only N buffers that is the place which the product
    reads. Triton has one buffer more there, except where rows go into registers as well, for another use. A loop that
    waits for all its products before it copies needs none.
    """
    buffers: dict[str, int] = {}
    views: dict[str, str] = {}
    copies: Counter[tuple[str, bool]] = Counter()
    under_way: set[str] = set()
    copied: set[str] = set()
    overtaken: set[str] = set()
    loops: list[int] = []
    for line in filter(str.strip, ttgir.splitlines()):
        indent = len(line) - len(line.lstrip())
        while loops and indent <= loops[-1]:
            loops.pop()
            # What a step leaves under way still reads while the next one copies.
            overtaken |= under_way & copied
            under_way, copied = set(), set()
        if found := _ALLOCATION.search(line):
            buffers[found[1]] = int(found[2])
        elif found := _VIEW.search(line):
            views[found[1]] = views.get(found[2], found[2])
        elif found := _COPY.search(line):
            buffer = views.get(found[1], found[1])
            copies[buffer, bool(loops)] += 1
            if loops:
                copied.add(buffer)
                overtaken |= under_way & {buffer}
        elif (found := _PRODUCT.search(line)) and loops:
            under_way |= {views.get(operand, operand) for operand in found.groups()}
        elif _WAITED_FOR.search(line):
            under_way = set()
        if " = scf.for " in line:
            loops.append(indent)
    return [
        f"{name} has {buffers[name]} buffers and is copied {copies[name, False]} steps ahead"
        for name in sorted(overtaken & buffers.keys())
        if buffers[name] <= copies[name, False]
    ]
