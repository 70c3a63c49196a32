"""Reads the rows of a dataset file (JSON lines) in bounded memory and says which lines are not valid, and why.

Knows the three shapes `chat-messages`, `prompt-completion` and `text`. Counts no tokens and changes no byte: what is
refused here is refused, never repaired.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from control_service.domain.dataset import DatasetRow
from control_service.domain.errors import FieldViolation, InvalidArgument

MAX_LINE_BYTES = 8 * 1024**2
MAX_DEPTH = 32
MAX_ERRORS = 100
ROLES = frozenset({"system", "user", "assistant", "tool"})
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _BadRow(Exception):
    """A row that is not valid, with what is wrong."""


@dataclass(frozen=True, kw_only=True)
class RowSummary:
    """What a valid file holds."""

    format: str
    num_examples: int


def read_dataset(stream: BinaryIO, *, format: str = "") -> RowSummary:
    """Reads every row. `format` empty: the shape of the first good row.

    InvalidArgument DATASET_EMPTY; DATASET_FORMAT_UNKNOWN; DATASET_MALFORMED with up to 100 violations named
    `line <n>`.
    """
    if format and format not in CHECKS:
        raise InvalidArgument(
            "DATASET_FORMAT_UNKNOWN",
            f"format {format!r} is not known; known are {', '.join(CHECKS)}",
            violations=(FieldViolation("format", "is not known"),),
        )
    errors: list[FieldViolation] = []
    num_errors = num_examples = 0
    for line, raw in _lines(stream):
        try:
            row = _parse(line, raw)
            format = format or _detect(row)
            CHECKS[format](row)
            num_examples += 1
        except _BadRow as problem:
            num_errors += 1
            if len(errors) < MAX_ERRORS:
                errors.append(FieldViolation(f"line {line}", str(problem)))
    if num_errors:
        raise _refusal(errors, num_errors, format)
    if not num_examples:
        raise InvalidArgument("DATASET_EMPTY", "the dataset has no example")
    return RowSummary(format=format, num_examples=num_examples)


def preview_rows(stream: BinaryIO, *, num_rows: int) -> tuple[DatasetRow, ...]:
    """The first rows of a valid file, as they are."""
    rows: list[DatasetRow] = []
    for line, raw in _lines(stream):
        if len(rows) == num_rows:
            break
        rows.append(DatasetRow(line=line, json=(raw or b"").decode().strip()))
    return tuple(rows)


def _refusal(errors: list[FieldViolation], num_errors: int, format: str) -> InvalidArgument:
    # When not one row had a known shape, the shape is what is wrong with the file.
    reason = "DATASET_MALFORMED" if format or _UNKNOWN_SHAPE not in errors[0].description else "DATASET_FORMAT_UNKNOWN"
    more = f" (and {num_errors - 1} more)" if num_errors > 1 else ""
    return InvalidArgument(
        reason,
        f"{errors[0].field}: {errors[0].description}{more}",
        details={"line": errors[0].field.removeprefix("line "), "num_bad_lines": str(num_errors)},
        violations=tuple(errors),
    )


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes) of every line that is not blank; None for a line longer than the cap."""
    line = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(raw) > MAX_LINE_BYTES:
            while not raw.endswith(b"\n") and (raw := stream.readline(MAX_LINE_BYTES)):
                pass
            yield line, None
        elif raw.strip():
            yield line, raw


def _parse(line: int, raw: bytes | None) -> Mapping[str, Any]:
    if raw is None:
        raise _BadRow(f"is longer than {MAX_LINE_BYTES} bytes")
    if line == 1 and raw.startswith(_BYTE_ORDER_MARK):
        raise _BadRow("starts with a byte order mark; save the file as UTF-8 without one")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _BadRow(f"is not UTF-8 at byte {error.start + 1}") from error
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise _BadRow(f"is nested deeper than {MAX_DEPTH}")
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise _BadRow(f"is not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:  # a number with thousands of digits
        raise _BadRow(f"is not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise _BadRow("is not a JSON object")
    return row


def _refuse_constant(name: str) -> None:
    raise _BadRow(f"is not JSON: {name} is not a JSON number")


def _depth(text: str) -> int:
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "}]":
            depth -= 1
    return deepest


_UNKNOWN_SHAPE = "has none of the known shapes"


def _detect(row: Mapping[str, Any]) -> str:
    found = [name for name, keys in KEYS.items() if keys <= row.keys()]
    if not found:
        shapes = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys in KEYS.items())
        raise _BadRow(f"{_UNKNOWN_SHAPE} ({shapes})")
    if len(found) > 1:
        raise _BadRow(f"has the keys of several formats ({', '.join(found)}); name the format")
    return found[0]


def _text(row: Mapping[str, Any], key: str, *, where: str = "", may_be_empty: bool = False) -> str:
    if key not in row:
        raise _BadRow(f"{where}has no {key!r}")
    value = row[key]
    if not isinstance(value, str):
        raise _BadRow(f"{where}{key!r} is not a string")
    if not may_be_empty and not value:
        raise _BadRow(f"{where}{key!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRow(f"{where}{key!r} holds half of a surrogate pair") from error
    return value


def _check_chat(row: Mapping[str, Any]) -> None:
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise _BadRow("has no 'messages' list" if "messages" not in row else "'messages' is not a list")
    if not messages:
        raise _BadRow("'messages' is empty")
    for index, message in enumerate(messages):
        where = f"messages[{index}]: "
        if not isinstance(message, dict):
            raise _BadRow(f"{where}is not an object")
        role = _text(message, "role", where=where)
        if role not in ROLES:
            raise _BadRow(f"{where}role {role[:32]!r} is none of {', '.join(sorted(ROLES))}")
        _text(message, "content", where=where, may_be_empty=True)


def _check_prompt_completion(row: Mapping[str, Any]) -> None:
    _text(row, "prompt", may_be_empty=True)
    _text(row, "completion")


def _check_text(row: Mapping[str, Any]) -> None:
    _text(row, "text")


KEYS: Mapping[str, frozenset[str]] = {
    "chat-messages": frozenset({"messages"}),
    "prompt-completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
}
CHECKS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "chat-messages": _check_chat,
    "prompt-completion": _check_prompt_completion,
    "text": _check_text,
}
