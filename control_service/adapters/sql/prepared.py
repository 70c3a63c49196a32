"""Statements of SQLAlchemy's that are compiled once and then given to the driver as they are: what a connection does
around a statement takes several times as long as a small statement itself. Values go and come through their columns'
types, and errors are SQLAlchemy's, as from a connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa

Row = dict[str, Any]
_Convert = Callable[[Any], Any]


class _Bind:
    """A parameter in its place."""

    def __init__(self, bind: Any, name: str, dialect: sa.Dialect) -> None:
        self._name = name
        self._required: bool = bind.required
        self._value = bind.value
        self._convert: _Convert | None = bind.type.dialect_impl(dialect).bind_processor(dialect)

    def parameter(self, values: Mapping[str, Any]) -> Any:
        """What the driver is given. KeyError when a value is missing."""
        value = values[self._name] if self._required else self._value
        return value if value is None or self._convert is None else self._convert(value)


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
        parameters = [bind.parameter(values) for bind in self._binds]
        cursor: Any = connection.connection.cursor()
        try:
            cursor.execute(self._text, parameters)
            found = cursor.fetchall() if self._columns else []
            count = cursor.rowcount
        except self._driver_error as error:
            raise sa.exc.DBAPIError.instance(self._text, parameters, error, self._driver_error) from error
        finally:
            cursor.close()
        return [
            {
                name: value if convert is None else convert(value)
                for (name, convert), value in zip(self._columns, row, strict=True)
            }
            for row in found
        ], count

    def _compile(self, dialect: sa.Dialect) -> None:
        compiled: Any = self._statement.compile(dialect=dialect)
        self._text = str(compiled)
        self._binds = [_Bind(compiled.binds[name], name, dialect) for name in compiled.positiontup or ()]
        self._columns: list[tuple[str, _Convert | None]] = [
            (column.name, column.type.dialect_impl(dialect).result_processor(dialect, None))
            for column in _columns(self._statement)
        ]
        module: Any = dialect.loaded_dbapi
        self._driver_error: type[Exception] = module.Error
        self._dialect = dialect


def _columns(statement: Any) -> list[Any]:
    """What the rows of a statement have."""
    if isinstance(statement, sa.Select):
        return list(statement.selected_columns)
    return list(getattr(statement, "exported_columns", ()))
