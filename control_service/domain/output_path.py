"""What an output directory may be called. Judges and normalizes a name; touches no disk."""

from __future__ import annotations

import re
import unicodedata

MAX_LENGTH = 512
MAX_SEGMENT_BYTES = 255
_ENCODED = re.compile(r"%(2e|2f|5c|00)", re.IGNORECASE)
# Names that Windows gives to devices, with or without an extension; clients may copy the tree there.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def problem_with_output_directory(value: str) -> str:
    """Says what is wrong with a relative output directory; empty when nothing is."""
    if not value:
        return "must not be empty"
    if len(value) > MAX_LENGTH:
        return f"must have at most {MAX_LENGTH} characters"
    # What can be printed has none; that is quickly told.
    if not value.isprintable() and any(unicodedata.category(character).startswith("C") for character in value):
        return "must not contain control or unassigned characters"
    if "\\" in value:
        return "must not contain a backslash; separate with /"
    if value.startswith("/") or re.match(r"[A-Za-z]:", value):
        return "must be relative"
    if ":" in value:
        return "must not contain a colon"
    if _ENCODED.search(value):
        return "must not contain percent-encoded separators or dots"
    segments = [segment for segment in value.split("/") if segment not in ("", ".")]
    if not segments:
        return "must name a directory below the output root"
    return next((problem for segment in segments if (problem := _problem_with_segment(segment))), "")


def normalize_output_directory(value: str) -> str:
    """Drops `.` and empty segments from a directory that has no problem: `./a//b/` becomes `a/b`."""
    return "/".join(segment for segment in value.split("/") if segment not in ("", "."))


def _problem_with_segment(segment: str) -> str:
    if segment == "..":
        return "must not contain .."
    if segment[-1] in ". " or segment[0] == " ":
        return f"{segment!r} must not end in a dot or space, nor start with a space"
    if len(segment.encode()) > MAX_SEGMENT_BYTES:
        return f"a segment must have at most {MAX_SEGMENT_BYTES} bytes"
    if _DEVICE.fullmatch(segment):
        return f"{segment!r} is a reserved name"
    return ""
