"""What a generation says down the pipe: parts of text, and one last message with how it ended. Encodes nothing else."""

from __future__ import annotations

import time
from typing import Any

from gpu_service.domain.errors import Refusal
from gpu_service.engine.generation.order import GenerationOrder
from gpu_service.engine.reporter import Notify


class Voice:
    """One generation's; counts its tokens and its time."""

    def __init__(self, order: GenerationOrder, notify: Notify) -> None:
        self._order = order
        self._notify = notify
        self._untold_tokens = 0
        self._num_tokens = 0
        self._first_token_seconds = 0.0

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def count_token(self) -> None:
        """A token was made; its text comes with the next part."""
        if not self._num_tokens:
            self._first_token_seconds = self._seconds()
        self._num_tokens += 1
        self._untold_tokens += 1

    def say(self, text: str) -> None:
        """A part, unless there is no text."""
        if text:
            self._send(text=text, num_tokens=self._take_untold())

    def finish(self, text: str, reason: str, *, num_prompt_tokens: int, warm: bool, resident: dict[str, Any]) -> None:
        """The last part, with the name of the finish reason."""
        self._send(
            done=True,
            text=text,
            num_tokens=self._take_untold(),
            finish_reason=reason,
            statistics={
                "num_prompt_tokens": num_prompt_tokens,
                "num_tokens": self._num_tokens,
                "first_token_seconds": self._first_token_seconds,
                "seconds": self._seconds(),
                "warm": warm,
            },
            resident=resident,
        )

    def stopped(self, *, resident: dict[str, Any]) -> None:
        """It was ended from outside; whoever ended it knows why."""
        self._send(done=True, resident=resident)

    def fail(self, refusal: Refusal, *, ends_engine: bool, resident: dict[str, Any]) -> None:
        """It came to nothing."""
        self._send(done=True, failure=refusal.to_failure(), ends_engine=ends_engine, resident=resident)

    def _take_untold(self) -> int:
        untold, self._untold_tokens = self._untold_tokens, 0
        return untold

    def _seconds(self) -> float:
        return time.monotonic() - self._order.arrival_seconds

    def _send(self, **fields: Any) -> None:
        self._notify({"type": "generated", "generation": self._order.id, **fields})
