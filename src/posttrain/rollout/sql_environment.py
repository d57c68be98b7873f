"""A database to work with: the policy looks at the schema, runs queries, reads rows or errors, and answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from posttrain.core import Message, Task
from posttrain.rollout.environment_tools import ToolEnvironment, Tools
from posttrain.rollout.tools import ToolError

SQLITE_SCHEMA = "SELECT sql FROM sqlite_master WHERE type = 'table' ORDER BY name"


class QueryAnswer(Protocol):
    """Rows, or why there are none. `grade.QueryResult` is one."""

    @property
    def rows(self) -> Sequence[Sequence[Any]] | None:
        """The rows; None where the query failed."""
        ...

    @property
    def error(self) -> str | None:
        """Why there are none."""
        ...


RunsQueries = Callable[[str], QueryAnswer]
"""Runs one read-only query under limits, and never raises for what is wrong with the query: a
`grade.SqliteDatabase(path)`, a `grade.PostgresDatabase(dsn)`. Its `schema_query`, where it has one, is how it
tells its tables."""

Databases = Callable[[Task], RunsQueries]


class SqlTools:
    """The tools of one episode on one database.

    Args:
        run: runs a query.
        schema: a query whose first column tells the tables.
        max_rows: rows that are shown; more are counted.
        max_value: characters of a value.
    """

    def __init__(self, run: RunsQueries, *, schema: str | None = None, max_rows: int = 10, max_value: int = 60) -> None:
        self._run, self._max_rows, self._max_value = run, max_rows, max_value
        self._schema = schema or str(getattr(run, "schema_query", SQLITE_SCHEMA))
        self.last_query = ""  # the newest that ran without an error

    async def schema(self) -> str:
        """The tables of the database and their columns."""
        answer = await asyncio.to_thread(self._run, self._schema)
        if answer.rows is None:
            raise ToolError(answer.error)
        return "\n".join(" ".join(str(row[0]).split()) for row in answer.rows if row[0])

    async def query(self, sql: str) -> str:
        """Run one SELECT query and read its rows.

        Args:
            sql: the query.
        """
        answer = await asyncio.to_thread(self._run, sql)
        if answer.rows is None:
            raise ToolError(answer.error)
        self.last_query = sql
        return self.table(answer.rows)

    def table(self, rows: Sequence[Sequence[Any]]) -> str:
        """Rows as text: a line each, values between bars."""
        if not rows:
            return "no rows"
        lines = [" | ".join(self._value(value) for value in row) for row in rows[: self._max_rows]]
        more = len(rows) - self._max_rows
        return "\n".join([*lines, f"… {more} rows more"] if more > 0 else lines)

    def _value(self, value: object) -> str:
        text = "NULL" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
        return text if len(text) <= self._max_value else text[: self._max_value] + "…"


def sql_environment(
    databases: Databases,
    *,
    judge: Callable[[Task, str, SqlTools], float] | None = None,
    system: str | None = None,
    max_rows: int = 10,
    with_schema: bool = True,
    failed_reward: float = 0.0,
) -> Callable[[], ToolEnvironment]:
    """A factory of environments with the tools `query` and `schema`.

    Args:
        databases: of a task, what runs its queries: the database may differ from task to task.
        judge: the reward at the end, from the task, the policy's answer, and the tools (`last_query` is the newest
            query that ran). None: 0.
        system: a system message before the task's prompt.
        max_rows: rows that are shown of a result.
        with_schema: offer the tool `schema`; else the prompt must tell the tables.
        failed_reward: added for every query that fails.
    """

    def make() -> ToolEnvironment:
        made: list[SqlTools] = []

        def tools(task: Task) -> Tools:
            made.append(SqlTools(databases(task), max_rows=max_rows))
            return [made[-1].query, made[-1].schema] if with_schema else [made[-1].query]

        def judged(task: Task, messages: Sequence[Message]) -> float:
            answer = messages[-1].content if messages[-1].role == "assistant" else ""
            return 0.0 if judge is None else judge(task, answer, made[-1])

        return ToolEnvironment(tools, judge=judged, system=system, failed_reward=failed_reward)

    return make
