"""The databases as an agent meets them: two tools, a judge, and the form of a conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from databases import load_databases, repeated_copy, tables

from posttrain import rollout
from posttrain.core import Message, Task
from posttrain.grade import QueryLimits, QueryRunner, rows_match

TEMPLATE = (  # roles, contents, and calls as [query(sql="SELECT …")]; no list of tools: the agent has seen no others
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}({% for name in call.function.arguments %}"
    "{{ ', ' if not loop.first }}{{ name }}={{ call.function.arguments[name] | tojson }}{% endfor %})]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_ROWS, MAX_CELL = 14, 24  # of a result, as it is shown


class World:
    """The databases, a second copy of each to judge on, and environments over them."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.databases = load_databases(source, folder)
        self.copies = {name: repeated_copy(path, folder / "copies") for name, path in self.databases.items()}
        self.tables = {name: tables(path) for name, path in self.databases.items()}
        self.runner = QueryRunner(QueryLimits(timeout_s=0.5, max_rows=2000))

    def ask(self, database: str, tool: str, argument: str) -> str:
        """What a tool answers.

        Args:
            database: its name.
            tool: `query`, or `schema`.
            argument: the query, or the name of the table whose columns are asked for.
        """
        if tool == "query":
            result = self.runner.run(self.databases[database], argument)
            return shown(result.rows) if result.rows is not None else self.told(database, argument, str(result.error))
        known = {name.lower(): columns for name, columns in self.tables[database].items()}
        return ", ".join(known.get(argument.lower()) or self.tables[database])

    def told(self, database: str, sql: str, error: str) -> str:
        """An error as the tool tells it; where a column is unknown, with the columns of the table that was asked."""
        asked = re.search(r"\bFROM (\w+)", sql)
        known = {name.lower(): columns for name, columns in self.tables[database].items()}
        columns = known.get(asked[1].lower()) if asked and error.startswith("no such column") else None
        return f"Error: {error[:40]}" if columns is None else f"Error: {error[:40]}\n{', '.join(columns)}"

    def environment(self, *, single: bool = False) -> rollout.ToolEnvironment:
        """One episode: looks and queries until the agent says that it is done. With `single`, one query and no look."""
        newest: list[str] = []

        def tools(task: Task) -> rollout.environment_tools.Tools:
            database = str(task.facts["database"])

            def query(sql: str) -> rollout.ToolAnswer:
                """Run a SELECT query; see its first rows, or the error."""
                newest[:] = [sql]
                return rollout.ToolAnswer(text=self.ask(database, "query", sql), done=single)

            def schema(table: str) -> rollout.ToolAnswer:
                """See the columns of a table."""
                return rollout.ToolAnswer(text=self.ask(database, "schema", table), done=single)

            return [rollout.FunctionTool(each, in_thread=False) for each in (query, schema)]

        def judge(task: Task, messages: Sequence[Message]) -> float:
            return float(bool(newest) and self.right(task, newest[0]))

        return rollout.ToolEnvironment(tools, judge=judge)

    def right(self, task: Task, sql: str) -> bool:
        """Whether a query gives the rows of an accepted one, on the database and on its copy."""
        name = str(task.facts["database"])
        if (given := self.runner.run(self.databases[name], sql).rows) is None:
            return False
        for gold in task.facts["sql"]:
            rows = self.runner.run(self.databases[name], gold).rows
            if rows is None or not rows_match(rows, given, ordered=False):
                continue
            copies = [self.runner.run(self.copies[name], each).rows for each in (gold, sql)]
            if copies[0] is None or (copies[1] is not None and rows_match(copies[0], copies[1], ordered=False)):
                return True
        return False

    def result(self, task: Task, sql: str) -> tuple[str, ...] | None:
        """What a query finds, in a form that can be counted; None where it fails or finds nothing."""
        rows = self.runner.run(self.databases[str(task.facts["database"])], sql).rows
        if not rows or all(cell in (None, 0) for row in rows for cell in row):
            return None
        return tuple(sorted(map(repr, rows)))


def shown(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as the tool shows them, the first of them."""
    lines = [" | ".join("NULL" if value is None else str(value)[:MAX_CELL] for value in row) for row in rows[:MAX_ROWS]]
    return "\n".join(lines) or "no rows"
