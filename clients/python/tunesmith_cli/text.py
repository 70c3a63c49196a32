"""Values as people read them; pure. Everything that came from a server passes through `printable`."""

import unicodedata

from google.protobuf.timestamp_pb2 import Timestamp

# Characters that turn the direction of text: a name must not be able to hide what it says.
_DIRECTION_MARKS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str, *, keep_newlines: bool = False) -> str:
    """The text with control characters and direction marks escaped, so that it cannot drive a terminal."""
    return "".join(
        character if (keep_newlines and character == "\n") or not _is_unsafe(character) else _escaped(character)
        for character in text
    )


def indented_lines(text: str, num_spaces: int) -> list[str]:
    """The text's lines, each indented, safe to print; at least one line, so that an empty text is seen to be empty."""
    return [" " * num_spaces + printable(line) for line in text.split("\n")]


def byte_count(num_bytes: int) -> str:
    """`1.5 GiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03`."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def moment(timestamp: Timestamp) -> str:
    """`2026-01-02 03:04:05` in UTC; empty when unset."""
    if not timestamp.seconds:
        return ""
    return timestamp.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTION_MARKS


def _escaped(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"
