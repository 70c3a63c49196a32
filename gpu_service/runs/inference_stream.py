"""A generation as the server sees it: parts come in from an engine's notices and go out to one reader.

What the reader has not taken yet is one part that grows: a slow reader costs no more than the answer's text, and never
holds up the engine. Refuses to wait for a reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_service.domain.errors import Fault, Refusal

# Largest text that goes out as one part.
MAX_PART_CHARACTERS = 32 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedPart:
    """New text with the number of tokens behind it; the last part has a finish reason and statistics."""

    text: str
    num_tokens: int
    # A name of the wire's `FinishReason` without its prefix; empty but in the last part.
    finish_reason: str = ""
    # Of the wire's `GenerationStatistics`, by field.
    statistics: Mapping[str, Any] | None = None


class Generation:
    """From its request file to what its engine said last."""

    def __init__(self, *, generation_id: str, directory: Path) -> None:
        """`directory` has the request file and the adapter, which an engine that has it may read."""
        self.id = generation_id
        self.directory = directory
        self.request_file = directory / "request.json"
        # No engine has it: not yet, or it is done with it.
        self.over = asyncio.Event()
        self.over.set()
        self._texts: list[str] = []
        self._num_tokens = 0
        self._finish_reason = ""
        self._statistics: Mapping[str, Any] | None = None
        self._refusal: Refusal | None = None
        self._changed = asyncio.Event()

    @property
    def is_settled(self) -> bool:
        """Its reader will be told nothing new."""
        return bool(self._finish_reason) or self._refusal is not None

    def take(self, message: Mapping[str, Any], *, engine_leaves: bool = False) -> None:
        """A `generated` message. Nothing counts any more once it has failed."""
        if not self.is_settled:
            self._texts.append(str(message.get("text", "")))
            self._num_tokens += int(message.get("num_tokens", 0))
            if message.get("finish_reason"):
                self._finish_reason = str(message["finish_reason"])
                self._statistics = message["statistics"]
            elif message.get("failure"):
                self._refusal = Refusal.from_failure(message["failure"])
            elif message.get("done"):
                self._refusal = draining() if engine_leaves else busy("the generation was ended")
        if message.get("done"):
            self.over.set()
        self._changed.set()

    def fail(self, refusal: Refusal) -> None:
        """End it for its reader, behind what came before; the first refusal stands."""
        if not self.is_settled:
            self._refusal = refusal
        self._changed.set()

    async def parts(self) -> AsyncGenerator[GeneratedPart, None]:
        """What has come since the last part, until the end. Raises `Refusal` NODE_BUSY, NODE_DRAINING, GENERATION,
        PROMPT_TOO_LONG, CHAT_TEMPLATE_MISSING, CHAT_TEMPLATE_UNUSABLE.
        """
        while True:
            self._changed.clear()
            text, num_tokens = "".join(self._texts), self._num_tokens
            self._texts, self._num_tokens = [], 0
            ended = self.is_settled
            while len(text) > MAX_PART_CHARACTERS:
                yield GeneratedPart(text=text[:MAX_PART_CHARACTERS], num_tokens=0)
                text = text[MAX_PART_CHARACTERS:]
            if ended and self._refusal is None:
                yield GeneratedPart(
                    text=text, num_tokens=num_tokens, finish_reason=self._finish_reason, statistics=self._statistics
                )
                return
            if text:
                yield GeneratedPart(text=text, num_tokens=num_tokens)
            if ended and self._refusal is not None:
                raise self._refusal
            await self._changed.wait()


def busy(message: str) -> Refusal:
    """Not now: runs go first."""
    return Refusal("NODE_BUSY", Fault.PLATFORM, message)


def draining() -> Refusal:
    """The node is stopping."""
    return Refusal("NODE_DRAINING", Fault.PLATFORM, "this node is draining")


def lost(message: str) -> Refusal:
    """The engine can say no more."""
    return Refusal("GENERATION", Fault.PLATFORM, message)


def hung(idle_seconds: float) -> Refusal:
    """The engine said nothing for too long, and was killed for it."""
    message = f"the engine made no progress for {idle_seconds:.0f} s and was killed"
    return Refusal("GENERATION", Fault.PLATFORM, message, details={"cause": "HANG"})


def given_up(generation_id: str) -> Generation:
    """One that a former server's reader asked for: nobody reads it, and its engine is not done with it."""
    generation = Generation(generation_id=generation_id, directory=Path())
    generation.fail(lost("the server that it was asked of is gone"))
    return generation
