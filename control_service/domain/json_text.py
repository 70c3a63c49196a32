"""Reads JSON values strictly: no NaN, no key twice, no endless depth. Writes them canonically. Repairs nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from control_service.domain.dataset_files import FileLimits, Trouble

# A string (also one that never ends, so that matching stays linear) or a bracket.
_STRINGS_AND_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


class SyntaxTrouble(Trouble):
    """The text is no JSON from `position` (characters from 0) on: or goes on where it was cut."""

    def __init__(self, message: str, *, position: int) -> None:
        super().__init__(message)
        self.position = position


@dataclass(frozen=True, kw_only=True, slots=True)
class Parsed:
    """A value, where it ends, and what is wrong with it although its syntax is right."""

    value: Any
    end: int
    trouble: Trouble | None


class JsonParser:
    """Parses values of one file. Not for several threads at once."""

    def __init__(self, limits: FileLimits) -> None:
        self._limits = limits
        self._found: list[Trouble] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def parse(self, text: str, start: int = 0) -> Parsed:
        """The value that begins at `start`. SyntaxTrouble; Trouble when it is nested too deeply to be read at all."""
        self._found = []
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise SyntaxTrouble(f"is not JSON: {error.msg}", position=error.pos) from error
        except RecursionError as error:
            raise self._too_deep() from error
        except ValueError as error:  # a number with thousands of digits
            raise Trouble(f"is not JSON that can be read: {error}") from error
        if not self._found and self._is_too_deep(text, start, end):
            self._found.append(self._too_deep())
        return Parsed(value=value, end=end, trouble=self._found[0] if self._found else None)

    def parse_whole(self, text: str) -> Any:
        """The value that the text is. Trouble with the column of a syntax error."""
        start = len(text) - len(text.lstrip(" \t\r\n"))
        try:
            parsed = self.parse(text, start)
            rest = text[parsed.end :].lstrip(" \t\r\n")
            if rest:
                raise SyntaxTrouble("is not JSON: Extra data", position=len(text) - len(rest))
        except SyntaxTrouble as trouble:
            column = trouble.position - text.rfind("\n", 0, trouble.position)
            raise Trouble(trouble.message, column=str(column)) from trouble
        if parsed.trouble is not None:
            raise parsed.trouble
        return parsed.value

    def parse_object(self, text: str) -> Mapping[str, Any]:
        """The object that the text is. Trouble, also when it is something else."""
        return as_object(self.parse_whole(text))

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            # One pass: an object may have as many keys as a row has room for.
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self._found.append(Trouble(f"has the key {shown(twice)} twice", key=twice))
        return found

    def _constant(self, name: str) -> None:
        self._found.append(Trouble(f"is not JSON: {name} is not a JSON number"))

    def _is_too_deep(self, text: str, start: int, end: int) -> bool:
        most = self._limits.max_depth
        if text.count("{", start, end) + text.count("[", start, end) <= most:
            return False
        depth = 0
        for match in _STRINGS_AND_BRACKETS.finditer(text, start, end):
            character = text[match.start()]
            if character in "{[":
                depth += 1
                if depth > most:
                    return True
            elif character != '"':
                depth -= 1
        return False

    def _too_deep(self) -> Trouble:
        return Trouble(f"is nested deeper than {self._limits.max_depth}")


def as_object(value: Any) -> Mapping[str, Any]:
    """The value, if it is an object. Trouble."""
    if not isinstance(value, dict):
        raise Trouble("is not a JSON object")
    return value


def canonical_bytes(row: Mapping[str, Any], *, sort_keys: bool = False) -> bytes:
    """The row as UTF-8 without white space. Trouble for what JSON or UTF-8 cannot hold."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=sort_keys).encode()
    except UnicodeEncodeError as error:
        raise Trouble("holds half of a surrogate pair") from error
    except ValueError as error:
        raise Trouble("has a number that is too large for JSON, or not finite") from error


def shown(text: str) -> str:
    """A piece of the data as an error may quote it."""
    return repr(text if len(text) <= 32 else text[:32] + "...")
