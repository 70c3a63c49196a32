"""Parts of a generation between an engine that speaks and a reader that may be slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_service.domain.errors import Refusal
from gpu_service.runs.inference_stream import MAX_PART_CHARACTERS, GeneratedPart, Generation, busy

STATISTICS = {"num_tokens": 3}
LAST = {"done": True, "text": "!", "num_tokens": 1, "finish_reason": "STOP", "statistics": STATISTICS}


def made() -> Generation:
    return Generation(generation_id="g", directory=Path("/nowhere"))


async def test_what_a_slow_reader_missed_is_one_part() -> None:
    generation = made()
    for _ in range(1000):
        generation.take({"text": "ab", "num_tokens": 1})
    parts = generation.parts()
    assert await anext(parts) == GeneratedPart(text="ab" * 1000, num_tokens=1000)
    generation.take({"text": "cd", "num_tokens": 2})
    generation.take(LAST)
    assert await anext(parts) == GeneratedPart(text="cd!", num_tokens=3, finish_reason="STOP", statistics=STATISTICS)
    assert [part async for part in parts] == []
    assert generation.over.is_set()


async def test_a_very_long_text_goes_out_in_pieces() -> None:
    generation = made()
    generation.take({"text": "x" * (2 * MAX_PART_CHARACTERS + 1), "num_tokens": 5})
    generation.take(LAST)
    parts = [part async for part in generation.parts()]
    assert [len(part.text) for part in parts] == [MAX_PART_CHARACTERS, MAX_PART_CHARACTERS, 2]
    assert [part.num_tokens for part in parts] == [0, 0, 6]


async def test_what_was_said_comes_before_the_refusal_and_nothing_after_it() -> None:
    generation = made()
    generation.take({"text": "half", "num_tokens": 1})
    generation.fail(busy("a run"))
    generation.fail(busy("another"))
    generation.take(LAST)
    parts = generation.parts()
    assert (await anext(parts)).text == "half"
    with pytest.raises(Refusal, match="NODE_BUSY: a run"):
        await anext(parts)


@pytest.mark.parametrize(
    ("message", "leaves", "reason"),
    [
        ({"failure": {"reason": "PROMPT_TOO_LONG", "fault": "USER", "message": "m"}}, False, "PROMPT_TOO_LONG"),
        ({}, False, "NODE_BUSY"),
        ({}, True, "NODE_DRAINING"),
    ],
)
async def test_how_an_engine_ends_it(message: dict[str, object], leaves: bool, reason: str) -> None:
    generation = made()
    generation.take({"done": True, **message}, engine_leaves=leaves)
    with pytest.raises(Refusal) as caught:
        [part async for part in generation.parts()]
    assert caught.value.reason == reason
