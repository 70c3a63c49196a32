"""Reads a JSON file that is an array of rows, or an object that holds one, as a stream with a window as large as a row.

Ours and not ijson, which is kept and quick: it holds a string of any length whole, and tells neither line nor column.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from control_service.adapters.files.detection import BYTE_ORDER_MARK
from control_service.domain.dataset_files import FileLimits, SourceRow, Trouble
from control_service.domain.json_text import JsonParser, Parsed, SyntaxTrouble, as_object, shown

_PIECE_BYTES: Final = 64 * 1024
_AFTER_A_VALUE: Final = frozenset(" \t\r\n,]}")
_SPACES: Final = re.compile(r"[ \t\r\n]*")


def read(stream: BinaryIO, limits: FileLimits) -> Iterator[SourceRow]:
    """The array's elements. Raises Trouble with line and column where the syntax is wrong: nothing after it is read."""
    window = _Window(stream, limits)
    if window.character() == "[":
        yield from _elements(window)
    else:
        yield from _members(window)
    if window.character():
        raise window.trouble("is not JSON: there is something after its end")


def _members(window: _Window) -> Iterator[SourceRow]:
    """The elements of the one array that the object holds; its other members say nothing."""
    window.take("{")
    held = ""
    while True:
        if window.character() != '"':
            raise window.trouble("is not JSON: a name in quotes should stand here")
        key = str(window.value().value)
        window.take(":")
        if window.character() != "[":
            window.value()
        elif held:
            raise window.trouble(f"the file holds several arrays ({shown(held)} and {shown(key)}); keep one")
        else:
            held = key
            yield from _elements(window)
        if window.take(",}") == "}":
            return


def _elements(window: _Window) -> Iterator[SourceRow]:
    window.take("[")
    if window.character() == "]":
        window.take("]")
        return
    number = 0
    while True:
        window.character()
        line = window.line
        parsed = window.value()
        number += 1
        try:
            if parsed.trouble is not None:
                raise parsed.trouble
            yield SourceRow(number=number, line=line, content=as_object(parsed.value))
        except Trouble as trouble:
            yield SourceRow(number=number, line=line, trouble=trouble)
        if window.take(",]") == "]":
            return


class _Window:
    """The text around the place that is read, and where in the file that is. `line` counts from 1."""

    def __init__(self, stream: BinaryIO, limits: FileLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._parser = JsonParser(limits)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0
        self._ended = False
        self._column = 1
        self.line = 1
        self._fill()
        self._text = self._text.removeprefix(BYTE_ORDER_MARK.decode())

    def character(self) -> str:
        """The next character that is not white space, not taken; empty at the end."""
        while True:
            match = _SPACES.match(self._text, self._at)
            assert match is not None
            self._advance(match.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._fill()

    def take(self, wanted: str) -> str:
        """Takes the next character, which must be one of these."""
        found = self.character()
        if not found:
            raise self.trouble("is not JSON: the file ends too early")
        if found not in wanted:
            raise self.trouble(f"is not JSON: {' or '.join(map(repr, wanted))} should stand here")
        self._advance(self._at + 1)
        return found

    def value(self) -> Parsed:
        """Takes the next value."""
        if not self.character():
            raise self.trouble("is not JSON: the file ends too early")
        while True:
            try:
                parsed = self._parser.parse(self._text, self._at)
            except SyntaxTrouble as trouble:
                # What looks wrong may only be cut: it is believed when the row is too long, or the file at its end.
                if self._ended:
                    self._advance(trouble.position)
                    raise self.trouble(trouble.message) from trouble
            except Trouble as trouble:
                raise self.trouble(trouble.message) from trouble
            else:
                if self._ended or self._is_whole(parsed.end):
                    self._check_size(parsed.end - self._at)
                    self._advance(parsed.end)
                    return parsed
            self._check_size(len(self._text) - self._at)
            self._fill()

    def trouble(self, message: str) -> Trouble:
        """A trouble at this place."""
        return Trouble(message, line=self.line, column=str(self._column))

    def _is_whole(self, end: int) -> bool:
        """Whether the value that ends there cannot go on: `1` may be the beginning of `1.5`."""
        return self._text[self._at] in '{["' or self._text[end : end + 1] in _AFTER_A_VALUE

    def _check_size(self, num_characters: int) -> None:
        if num_characters > self._limits.max_row_bytes:
            raise self.trouble(f"is longer than {self._limits.max_row_bytes} bytes, or its JSON is broken")

    def _advance(self, end: int) -> None:
        num_lines = self._text.count("\n", self._at, end)
        self.line += num_lines
        self._column = end - self._text.rfind("\n", self._at, end) if num_lines else self._column + end - self._at
        self._at = end

    def _fill(self) -> None:
        """Reads on, as much again as is held, so that a long row is parsed anew only a few times."""
        held = self._text[self._at :]
        data = self._stream.read(max(_PIECE_BYTES, len(held)))
        try:
            self._text, self._at = held + self._decoder.decode(data, not data), 0
        except UnicodeDecodeError as error:
            before = held + error.object[: error.start].decode()
            line = self.line + before.count("\n")
            column = len(before) - before.rfind("\n") if "\n" in before else self._column + len(before)
            raise Trouble("is not UTF-8", line=line, column=str(column)) from error
        self._ended = not data
