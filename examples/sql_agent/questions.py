"""Questions about the databases, made from their schemas and kept only where execution confirms the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from databases import TextColumn, tables, text_columns

from posttrain.core import Message, Task, ToolCall, assistant, generator, user
from posttrain.grade import QueryRunner

EMPTY = ("0", "no rows")  # how the tool shows that nothing was found


def questions(runner: QueryRunner, databases: dict[str, Path], *, per_value: int, seed: int) -> list[Task]:
    """Questions that name a table and a value, and leave it to the agent to find the column that holds the value.

    Kept are values that lie in exactly one column of their table, so that there is one answer; its rows, not its query,
    are the task's `facts["rows"]`. `facts["columns"]` are the table's columns of words, the right one first, for
    demonstrations.

    Args:
        runner: runs queries.
        databases: their files by name.
        per_value: questions about each value, of which one counts and the others ask for a column.
        seed: decides the columns.
    """
    made: list[Task] = []
    for database, path in databases.items():
        columns = text_columns(database, path)
        every = tables(path)
        for column in columns:
            same_table = [other for other in columns if other.table == column.table]
            for value in column.counts:
                if sum(value in other.counts for other in same_table) > 1:
                    continue
                random = generator(seed, "question", database, column.table, column.name, value)
                others = [name for name in every[column.table] if name != column.name]
                wanted = [None, *random.sample(others, min(per_value - 1, len(others)))]
                made.extend(
                    task
                    for want in wanted
                    if (task := question(runner, path, column, value, want, same_table)) is not None
                )
    return made


def question(
    runner: QueryRunner, path: Path, column: TextColumn, value: str, want: str | None, same_table: Sequence[TextColumn]
) -> Task | None:
    """One question, or None where its query fails or finds nothing worth asking for."""
    found = runner.run(path, query(column.table, want, column.name, value))
    if not found.rows or len(found.rows) > 10 or all(cell is None for row in found.rows for cell in row):
        return None
    asked = f"how many {column.table}" if want is None else f"{want} of {column.table}"
    names = [column.name, *(other.name for other in same_table if other.name != column.name)]
    facts = {
        "database": column.database,
        "table": column.table,
        "want": want,
        "value": value,
        "columns": names,
        "rows": [[list(row) for row in found.rows]],
    }
    name = f"{column.database}/{column.table}/{value}/{want or '*'}"
    return Task(
        id=name, prompt=f"{column.database}: {asked} with '{value}'?", facts=facts, cluster=f"{column.table}/{value}"
    )


def query(table: str, want: str | None, column: str, value: str) -> str:
    """The query that asks for a value in a column."""
    return f"SELECT {want or 'count(*)'} FROM {table} WHERE {column} = '{value}'"


def split(tasks: Sequence[Task], seed: int) -> tuple[list[Task], list[Task], list[Task]]:
    """Tasks to show, to practise on and to hold out: a quarter, a half and a quarter of the values."""
    parts: tuple[list[Task], list[Task], list[Task]] = ([], [], [])
    for task in tasks:
        draw = generator(seed, "split", str(task.facts["database"]), str(task.cluster)).random()
        parts[0 if draw < 0.25 else 1 if draw < 0.75 else 2].append(task)
    for part in parts:
        generator(seed, "order").shuffle(part)
    return parts


def demonstration(runner: QueryRunner, databases: dict[str, Path], task: Task, place: int, seed: int) -> list[Message]:
    """How a careless person asks: the first column half at random; nothing found, they may give up."""
    facts, random = task.facts, generator(seed, "demonstration", task.id, place)
    right, *others = facts["columns"]
    random.shuffle(others)
    order = [right, *others] if random.random() < 0.5 else [*others[:2], right, *others[2:]]
    messages = [user(task.prompt_text())]
    for column in order:
        sql = query(facts["table"], facts["want"], column, facts["value"])
        found = shown(runner.run(databases[facts["database"]], sql).rows)
        messages.append(Message(role="assistant", tool_calls=(ToolCall(name="query", arguments={"sql": sql}),)))
        messages.append(Message(role="tool", content=found, name="query"))
        if found not in EMPTY or random.random() < 0.4:
            break
    return [*messages, assistant("done")]


def shown(rows: Sequence[Sequence[Any]] | None) -> str:
    """Rows as the tool shows them, the first two of them."""
    if not rows:
        return EMPTY[1]
    lines = [" | ".join("NULL" if value is None else str(value)[:20] for value in row) for row in rows[:2]]
    return "\n".join(lines)


def human_questions(runner: QueryRunner, databases: dict[str, Path], source: Path) -> list[Task]:
    """The questions that people wrote, with the rows of every accepted query that runs."""
    made = []
    for name in ("questions_gen_sqlite", "instruct_basic_sqlite", "instruct_advanced_sqlite"):
        for place, line in enumerate((source / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            golds = [gold.strip() for gold in row["query"].split(";") if gold.strip()]
            results = [runner.run(databases[row["db_name"]], gold).rows for gold in golds]
            rows = [[list(each) for each in result] for result in results if result is not None]
            facts = {"database": row["db_name"], "rows": rows}
            made.append(Task(id=f"{name}-{place}", prompt=f"{row['db_name']}: {row['question']}", facts=facts))
    return made
