"""What a mutation is: one thing taken out of the product, and the tests that must go red without it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """`snippet` stands exactly once in `file`; `replacement` takes its place. Every test of `tests` must fail then."""

    name: str
    # `R1` to `R33`, as docs/operations.md numbers them, or `mix` for the contract of docs/training.md.
    promise: str
    # Relative to the repository, with forward slashes.
    file: str
    snippet: str
    replacement: str
    # pytest's node ids without parameters.
    tests: tuple[str, ...]
