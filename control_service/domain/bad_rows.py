"""Gathers the first hundred bad rows of a file and makes the refusal that names them all. Judges no row."""

from __future__ import annotations

from collections.abc import Sequence

from control_service.domain.dataset_files import JSON, TABLES, SourceRow, Trouble, UnknownFile
from control_service.domain.errors import FieldViolation, InvalidArgument

MAX_BAD_ROWS = 100
# All violations together, as UTF-8: what an error can carry is cut beyond it, and then not every row would be named.
MAX_VIOLATIONS_BYTES = 1400
_MAX_DESCRIPTION_BYTES = 200


class BadRows:
    """The bad rows of one file."""

    def __init__(self, *, file_format: str) -> None:
        self._file_format = file_format
        self._first: list[tuple[SourceRow, Trouble]] = []
        self.num_bad = 0

    def add(self, row: SourceRow, trouble: Trouble) -> None:
        """Keeps the places of the first hundred, counts all."""
        self.num_bad += 1
        # Whatever holds the row's text is let go: its content, and where the trouble was raised and over what.
        trouble.__cause__ = trouble.__context__ = trouble.__traceback__ = None
        if len(self._first) < MAX_BAD_ROWS:
            self._first.append((SourceRow(number=row.number, line=row.line), trouble))

    def first_is(self, kind: type[Trouble]) -> bool:
        """Whether the first trouble is of a kind."""
        return bool(self._first) and isinstance(self._first[0][1], kind)

    def refusal(self, *, is_unknown_shape: bool) -> InvalidArgument:
        """DATASET_MALFORMED, or DATASET_FORMAT_UNKNOWN when not one row had a known shape."""
        row, trouble = self._first[0]
        place = self._place(row, trouble)
        more = f" (and {self.num_bad - 1} more)" if self.num_bad > 1 else ""
        details = {
            "file_format": self._file_format,
            "line": str(trouble.line or row.line or ""),
            "row": str(row.number),
            "column": self._column(trouble),
            "num_bad_lines": str(self.num_bad),
        }
        return InvalidArgument(
            "DATASET_FORMAT_UNKNOWN" if is_unknown_shape or isinstance(trouble, UnknownFile) else "DATASET_MALFORMED",
            f"{self._file_format}: {place}: {_cut(trouble.message)}{more}",
            details={name: value for name, value in details.items() if value},
            violations=tuple(self._violations()),
        )

    def _violations(self) -> list[FieldViolation]:
        """Each bad row with what is wrong, as long as there is room left to name the others in one last violation."""
        found: list[FieldViolation] = []
        left = MAX_VIOLATIONS_BYTES
        for index, (row, trouble) in enumerate(self._first):
            violation = FieldViolation(self._place(row, trouble), _cut(trouble.message))
            left -= len(violation.field.encode()) + len(violation.description.encode())
            rest = self._rest(index + 1)
            if rest is not None and left < len(rest.field) + len(rest.description):
                rest = self._rest(index)
                return [*found, rest] if rest is not None else found
            found.append(violation)
        return found

    def _rest(self, start: int) -> FieldViolation | None:
        rows = [row for row, _ in self._first[start:]]
        if not rows:
            return None
        if rows[0].line and self._file_format != JSON:
            return FieldViolation("lines", f"also bad: {_ranges([row.line for row in rows])}")
        return FieldViolation("rows", f"also bad: {_ranges([row.number for row in rows])}")

    def _place(self, row: SourceRow, trouble: Trouble) -> str:
        line = trouble.line or row.line
        parts = [f"line {line}"] if line else []
        # All of a JSON file may be one line.
        parts += [f"row {row.number}"] if not line or self._file_format == JSON else []
        if column := self._column(trouble):
            parts.append(f"column {column}")
        return ", ".join(parts)

    def _column(self, trouble: Trouble) -> str:
        return trouble.column or (trouble.key if self._file_format in TABLES else "")


def _ranges(numbers: Sequence[int]) -> str:
    """`3, 7-9` for ascending numbers."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number <= parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _cut(text: str) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= _MAX_DESCRIPTION_BYTES:
        return encoded.decode()
    return encoded[: _MAX_DESCRIPTION_BYTES - 3].decode(errors="ignore") + "..."
