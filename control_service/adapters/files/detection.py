"""Tells a file's format from how it begins, never from its name. Reads no rows."""

from __future__ import annotations

import re
from typing import Final

from control_service.domain.dataset_files import CSV, JSON, JSON_LINES, PARQUET, UnknownFile
from control_service.domain.row_shapes import KEYS, KNOWN_KEYS

HEAD_BYTES: Final = 256 * 1024
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_PARQUET_MAGIC: Final = b"PAR1"
# Longest first: the mark of UTF-32 begins with that of UTF-16.
_OTHER_ENCODINGS: Final = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
# What follows the bracket of an array of rows: one of them, its end, or what lies beyond the head.
_ROWS_BEGIN: Final = re.compile(rb"\s*(?:[{\]]|\Z)")
_TOKENS: Final = re.compile(rb'"(?:[^"\\\n]*(?:\\[^\n][^"\\\n]*)*)"?|[\[\]{}:\n]')


def detect_format(head: bytes) -> str:
    """The format of a file whose content begins so. UnknownFile when it is none that is read here."""
    if head.startswith(_PARQUET_MAGIC):
        return PARQUET
    for mark, encoding in _OTHER_ENCODINGS:
        if head.startswith(mark):
            raise UnknownFile(f"the file is {encoding}; save it as UTF-8", line=1)
    if b"\x00" in head:
        raise UnknownFile("the file is neither JSON, CSV nor Parquet, plain or compressed", line=1)
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"["):
        return JSON
    if text.startswith(b"{"):
        return JSON if _holds_an_array_of_rows(text) else JSON_LINES
    return CSV if text else JSON_LINES


def _holds_an_array_of_rows(text: bytes) -> bool:
    """Whether the object that a file begins with is one around the rows, and not itself the first of them."""
    keys, arrays = set(), set()
    depth = 0
    key = string = b""
    for match in _TOKENS.finditer(text):
        token = match.group()
        if token.startswith(b'"'):
            string = token.strip(b'"')
        elif token == b":" and depth == 1:
            key = string
            keys.add(key.decode(errors="replace"))
        elif token in (b"{", b"["):
            if token == b"[" and depth == 1 and _ROWS_BEGIN.match(text, match.end()):
                arrays.add(key.decode(errors="replace"))
            depth += 1
        elif token in (b"}", b"]"):
            depth -= 1
            if depth == 0:
                if text[match.end() :].strip():
                    return False
                break
    is_row = any(wanted <= keys for wanted in KEYS.values())
    return not is_row and bool(arrays - KNOWN_KEYS)
