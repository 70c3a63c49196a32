"""Where results go: tables for people, proto JSON for scripts. Decides nothing about what is shown.

Results go to standard output, remarks to standard error, so that a pipe gets only results. Off a terminal tables lose
their rules and never wrap; NO_COLOR is honored.
"""

import json
from collections.abc import Iterable, Sequence
from enum import StrEnum

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith_cli.text import printable

_WIDTH_OFF_TERMINAL = 100_000


class Format(StrEnum):
    """How results are written."""

    TABLE = "table"
    JSON = "json"


class Output:
    """Writes results in one format."""

    def __init__(self, format: Format, *, console: Console | None = None, remarks: Console | None = None) -> None:
        self.format = format
        self.console = console or _console(stderr=False)
        self.remarks = remarks or _console(stderr=True)

    @property
    def is_json(self) -> bool:
        """Whether results are JSON."""
        return self.format is Format.JSON

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        messages: Iterable[Message],
        *,
        title: str = "",
    ) -> None:
        """A list: a table of rows, or a JSON array of the messages."""
        if self.is_json:
            self.json([as_json(message) for message in messages])
            return
        self.rows(columns, rows, title=title)

    def rows(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
        """A table for people, whatever the format."""
        on_terminal = self.console.is_terminal
        table = Table(
            title=printable(title) or None,
            title_justify="left",
            box=box.SIMPLE_HEAD if on_terminal else None,
            pad_edge=False,
        )
        for column in columns:
            table.add_column(Text(column), no_wrap=not on_terminal, overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(str(cell))) for cell in row))
        self.console.print(table)

    def message(self, message: Message, lines: Iterable[tuple[str, object]]) -> None:
        """One thing: `name  value` lines, or the message as JSON."""
        if self.is_json:
            self.json(as_json(message))
            return
        pairs = [(name, str(value)) for name, value in lines if str(value)]
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            self.line(f"{name:<{width}}  {value}")

    def line(self, text: str) -> None:
        """A line of result."""
        self.console.print(Text(printable(text)), soft_wrap=True)

    def styled(self, text: Text) -> None:
        """A piece of result that has styles; its maker has made it safe to print."""
        self.console.print(text, soft_wrap=True)

    def remark(self, text: str, *, style: str = "") -> None:
        """A line about what is done, to standard error."""
        self.remarks.print(Text(printable(text, keep_newlines=True), style=style), soft_wrap=True)

    def json(self, value: object) -> None:
        """A JSON document on lines of its own."""
        self.console.out(json.dumps(value, indent=2), highlight=False)

    def json_line(self, message: Message) -> None:
        """A message as one line of JSON, flushed."""
        self.console.out(json.dumps(as_json(message)), highlight=False)
        self.console.file.flush()


def as_json(message: Message) -> dict[str, object]:
    """Proto JSON with the contract's field names; 64-bit integers are strings, as proto JSON has them."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH_OFF_TERMINAL
    return console
