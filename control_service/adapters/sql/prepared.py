"""Statements of SQLAlchemy's that are compiled once and then given to the driver as they are: what a connection does
around a statement takes several times as long as a small statement itself. Values go and come through their columns'
types, and errors are SQLAlchemy's, as from a connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa

Row = dict[str, Any]
_Convert = Callable[[Any], Any]


class Prepared:
    """One statement. Parameters are named in it; rows come as dicts by the columns' names."""

    def __init__(self, statement: sa.Executable) -> None:
        self._statement: Any = statement
        self._dialect: sa.Dialect | None = None

    def run(self, connection: sa.Connection, values: Mapping[str, Any]) -> list[Row]:
        """Every row; none for a statement that gives none."""
        rows, _ = self._run(connection, values)
        return rows

    def first(self, connection: sa.Connection, values: Mapping[str, Any]) -> Row | None:
        """The first row, if there is one."""
        rows, _ = self._run(connection, values)
        return rows[0] if rows else None

    def count(self, connection: sa.Connection, values: Mapping[str, Any]) -> int:
        """How many rows were changed."""
        _, count = self._run(connection, values)
        return count

    def _run(self, connection: sa.Connection, values: Mapping[str, Any]) -> tuple[list[Row], int]:
        if self._dialect is not connection.dialect:
            self._compile(connection.dialect)
        # KeyError when a value is missing.
        parameters = [
            value if (value := fixed if name is None else values[name]) is None or convert is None else convert(value)
            for name, fixed, convert in self._binds
        ]
        cursor: Any = connection.connection.cursor()
        try:
            cursor.execute(self._text, parameters)
            found = cursor.fetchall() if self._columns else []
            count = cursor.rowcount
        except self._driver_error as error:
            raise sa.exc.DBAPIError.instance(self._text, parameters, error, self._driver_error) from error
        finally:
            cursor.close()
        return [self._row(values) for values in found], count

    def _row(self, values: tuple[Any, ...]) -> Row:
        row = dict(zip(self._names, values, strict=True))
        for name, convert in self._converts:
            row[name] = convert(row[name])
        return row

    def _compile(self, dialect: sa.Dialect) -> None:
        compiled: Any = self._statement.compile(dialect=dialect)
        self._text = str(compiled)
        self._binds = [_bind(compiled.binds[name], name, dialect) for name in compiled.positiontup or ()]
        self._columns = _columns(self._statement)
        self._names = [column.name for column in self._columns]
        converts = [column.type.dialect_impl(dialect).result_processor(dialect, None) for column in self._columns]
        # Of most columns what the driver gives is the value.
        self._converts: list[tuple[str, _Convert]] = [
            (name, convert) for name, convert in zip(self._names, converts, strict=True) if convert is not None
        ]
        module: Any = dialect.loaded_dbapi
        self._driver_error: type[Exception] = module.Error
        self._dialect = dialect


def _bind(bind: Any, name: str, dialect: sa.Dialect) -> tuple[str | None, Any, _Convert | None]:
    """A parameter in its place: the name of its value, or none and the value that it always has; and what makes of it
    what the driver is given."""
    convert = bind.type.dialect_impl(dialect).bind_processor(dialect)
    return (name, None, convert) if bind.required else (None, bind.value, convert)


def _columns(statement: Any) -> list[Any]:
    """What the rows of a statement have."""
    if isinstance(statement, sa.Select):
        return list(statement.selected_columns)
    return list(getattr(statement, "exported_columns", ()))
