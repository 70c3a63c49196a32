"""A generation of the stub engine: says what its prompt scripts, one word a token. Hears a stop before each.

The script is the JSON object in the last message; without one the words are the message's own. Keys, all optional:

words               what is said; each is one token
endless             go on saying "word " until stopped
until_file          wait before each word after the first until the file exists; stops are still obeyed
fail_after          end with a typed failure, and the engine with it, after so many words; 0: before any stop is heard
hang_after, way     stop making progress after so many words, in a way of `tests.fakes.hanging`
exit_after          leave without a word after so many words; 0 as above
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fakes.hanging import hang_up

_WORD_SECONDS = 0.002
_FAILURE = {"reason": "GENERATION", "fault": "PLATFORM", "message": "scripted failure"}


def answer(
    message: dict[str, Any], send: Callable[[dict[str, Any]], None], is_stopped: Callable[[float], bool]
) -> bool:
    """Carry out a `generate` message; False when the engine is to end. `is_stopped` waits so many seconds at most."""

    def say(**fields: Any) -> None:
        send({"type": "generated", "generation": message["generation"], **fields})

    request = json.loads(Path(message["request"]).read_text(encoding="utf-8"))
    adapter = request["adapter_directory"]
    names = sorted(path.name for path in Path(adapter).iterdir()) if adapter else []
    content = request["messages"][-1]["content"]
    script: dict[str, Any] = json.loads(content) if content.startswith("{") else {"words": content.split(" ")}
    resident = {"base_model": request["base_model"], "weights_digest": request["weights_digest"], "bytes": 1}
    start = time.monotonic()
    number = 0
    if script.get("fail_after") == 0:
        say(done=True, failure=_FAILURE, ends_engine=True, resident={})
        return False
    if script.get("exit_after") == 0:
        os._exit(7)
    for number, word in enumerate(_words(script, names), start=1):
        if is_stopped(_WORD_SECONDS) or not _is_let_on(script, number, is_stopped):
            say(done=True, resident=resident)
            return True
        say(text=word, num_tokens=1)
        if script.get("fail_after") == number:
            say(done=True, failure=_FAILURE, ends_engine=True, resident={})
            return False
        if script.get("exit_after") == number:
            os._exit(7)
        if script.get("hang_after") == number:
            hang_up(script["way"], Path(message["request"]).parent)
    statistics: dict[str, Any] = {"num_prompt_tokens": 3, "num_tokens": number, "warm": True}
    statistics |= {"first_token_seconds": 0.001, "seconds": time.monotonic() - start}
    say(done=True, text="", num_tokens=0, finish_reason="STOP", statistics=statistics, resident=resident)
    return True


def _words(script: dict[str, Any], adapter_files: list[str]) -> Iterator[str]:
    if script.get("endless"):
        return itertools.repeat("word ")
    if script.get("adapter_files"):
        return iter(adapter_files)
    return iter([f"{word} " for word in script.get("words", ())])


def _is_let_on(script: dict[str, Any], number: int, is_stopped: Callable[[float], bool]) -> bool:
    while number > 1 and "until_file" in script and not Path(script["until_file"]).exists():
        if is_stopped(0.02):
            return False
    return True
