"""The grader of text-to-SQL: the model's query and the gold query must give the same rows (execution accuracy).

Source: test-suite accuracy, Zhong, Yu and Klein, 2020 (arXiv 2010.02840): several databases with the same schema and
other rows tell apart queries that agree by chance on one.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from posttrain.core import ConfigError, Grade, GradeCase, GradeError, Task, Trajectory
from posttrain.grade.answer import accepted_answers, answer_text, right, wrong
from posttrain.grade.sql_compare import Columns, Row, results_match
from posttrain.grade.sql_database import SqlDatabase, SqliteDatabase
from posttrain.grade.sql_runner import QueryLimits, QueryResult, QueryRunner
from posttrain.grade.sql_syntax import ordered_at_top

Database = Path | SqlDatabase
Databases = (
    Database
    | Sequence[Database]
    | Mapping[str, Database | Sequence[Database]]
    | Callable[[Task], Database | Sequence[Database]]
)

_FENCE = re.compile(r"```[ \t]*+[\w+-]*+[ \t]*+\n(.*?)(?:```|\Z)", re.DOTALL)


def sql_in(text: str) -> str:
    """The query in an answer: what stands in the last fenced code block, or else the whole text."""
    fenced = _FENCE.findall(text)
    return (fenced[-1] if fenced else text).strip()


class SqlResult:
    """1 where the model's query gives the rows of the gold query (`task.answer`) on every database, else 0.

    The model's query runs read-only: one SELECT, a list of harmless functions, no other file, and limits on time, rows
    and the size of values. What the model's query does wrong scores 0 and is said in `rationale`; a gold query that
    fails, or a database that cannot be opened, is the grader's failure and raises GradeError. Other accepted gold
    queries may stand in `task.facts["answers"]`.

    Parts: `executes` 1 where the query ran on every database; `match` 1 where it gave the gold rows; `timeout` 1 where
    it was stopped by the clock; `empty_gold` 1 where the gold query gives no rows on any database, so that a match
    proves little (count these, and give more databases).

    Args:
        databases: what every query runs on: SQLite files, or others such as `PostgresDatabase`; or a mapping from
            `task.facts["database"]` to those of that name; or a function from the task to its own.
        ordered: whether the order of rows counts: "auto" where the gold query itself has an ORDER BY.
        columns: "same": the gold query's columns in its order; "any_order": in any; "superset": others may stand among
            them (as in Defog's SQL-Eval), so that a query which also shows the name is not wrong.
        timeout_s: CPU seconds for one query on one file. This and the two other limits are for files: a
            `PostgresDatabase` has its own.
        max_rows: more rows than this are a failure.
        extract: from the answer's text to its query; `sql_in` if not given.
        tolerance: largest difference of two numbers of which one is not an integer, relative or absolute.
        executes_score: score of a query that runs and gives other rows than the gold query.
        max_value_bytes: longest text or blob that a query may read or make; larger is slower to defend.
        name: the grader's name.
    """

    def __init__(
        self,
        databases: Databases,
        *,
        ordered: bool | Literal["auto"] = "auto",
        columns: Columns = "same",
        timeout_s: float = 1.0,
        max_rows: int = 10_000,
        extract: Callable[[str], str] | None = None,
        tolerance: float = 1e-9,
        executes_score: float = 0.0,
        max_value_bytes: int = 100_000,
        name: str = "sql_result",
    ) -> None:
        if ordered not in (True, False, "auto"):
            raise ConfigError(f"grader {name!r}: ordered must be True, False or 'auto', not {ordered!r}")
        self.name = name
        self._databases = databases
        if columns not in ("same", "any_order", "superset"):
            raise ConfigError(f"grader {name!r}: columns must be same, any_order or superset, not {columns!r}")
        self._ordered = ordered
        self._columns = columns
        self._extract = extract or sql_in
        self._tolerance = tolerance
        self._executes_score = executes_score
        limits = QueryLimits(timeout_s=timeout_s, max_rows=max_rows, max_value_bytes=max_value_bytes)
        self._runner = QueryRunner(limits)
        # Threads of its own, no more than can run: a query's wait for a processor is no part of its deadline.
        self.max_concurrency = max(2, min(8, os.cpu_count() or 2))
        self._threads = ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="sql")

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Run both queries, compare; raises GradeError where the gold query or a database is at fault."""
        started_s = time.perf_counter()
        sql = self._extract(answer_text(trajectory))
        golds = accepted_answers(trajectory.task)
        databases = self._of(trajectory.task)
        known = all(database.remembered(query) for database in databases for query in (sql, *golds))
        if known:
            grade = self._compare(trajectory.task, sql, golds, databases)
        else:
            loop = asyncio.get_running_loop()
            grade = await loop.run_in_executor(self._threads, self._compare, trajectory.task, sql, golds, databases)
        return grade.replace(seconds=time.perf_counter() - started_s)

    def cases(self) -> Sequence[GradeCase]:
        """Gold queries and near misses that any database can answer, and queries that must not run."""
        name = next(iter(self._databases)) if isinstance(self._databases, Mapping) else None
        facts = {} if name is None else {"database": name}
        rows = "SELECT 1 AS a, 'x' AS b UNION ALL SELECT 2, 'y' UNION ALL SELECT 2, 'y'"
        bag = Task(id="rows", prompt="Some rows.", answer=rows, facts=facts)
        falling = f"SELECT a FROM ({rows}) AS t ORDER BY a DESC"
        listed = Task(id="order", prompt="In order.", answer=falling, facts=facts)
        third = Task(id="float", prompt="A third?", answer="SELECT 1.0 / 3", facts=facts)
        free = self._ordered is not True
        swapped = "SELECT 'x', 1 UNION ALL SELECT 'y', 2 UNION ALL SELECT 'y', 2"
        wider = "SELECT 1, 'x', 7 UNION ALL SELECT 2, 'y', 8 UNION ALL SELECT 2, 'y', 9"
        bad = [
            ("SELECT 1, 'x' UNION SELECT 2, 'y' UNION SELECT 2, 'y'", "a row too few"),
            ("SELECT 1, 'X' UNION ALL SELECT 2, 'y' UNION ALL SELECT 2, 'y'", "another text"),
            (f"{rows}; {rows}", "two statements"),
            ("DROP TABLE x", "no query"),
            ("ATTACH DATABASE ':memory:' AS other", "no query"),
            ("SELECT nothing FROM nowhere", "no such table"),
            ("", "nothing"),
        ]
        good = [(bag, rows), (bag, f"```sql\n{rows};\n```"), (third, "SELECT 0.1 / 0.3")]
        for text, why, fine in (
            (swapped, "columns the other way round", self._columns != "same"),
            (wider, "a column more", self._columns == "superset"),
        ):
            if fine:
                good.append((bag, text))
            else:
                bad.append((text, why))
        if free:
            good.append((bag, "SELECT 2.0, 'y' UNION ALL SELECT 1, 'x' UNION ALL SELECT 2, 'y'"))
        misses = [wrong(bag, text, why) for text, why in bad] + [wrong(third, "SELECT 0.33", "rounded")]
        if self._ordered is not False:
            misses.append(wrong(listed, f"SELECT a FROM ({rows}) AS t ORDER BY a", "the other order"))
        return (
            *(right(task, text) for task, text in good),
            *(case.replace(high=self._executes_score) for case in misses),
        )

    def _of(self, task: Task) -> tuple[SqlDatabase, ...]:
        databases = self._databases
        if isinstance(databases, Mapping):
            name = task.facts.get("database")
            if not isinstance(name, str) or name not in databases:
                raise GradeError(f"task {task.id!r}: facts['database'] is {name!r}, none of {sorted(databases)}")
            databases = databases[name]
        elif callable(databases) and not isinstance(databases, SqlDatabase):
            databases = databases(task)
        several = (databases,) if isinstance(databases, Path | SqlDatabase) else tuple(databases)
        if not several:
            raise GradeError(f"task {task.id!r}: no database to run its query on")
        return tuple(
            database if isinstance(database, SqlDatabase) else SqliteDatabase(Path(database), self._runner)
            for database in several
        )

    def _compare(self, task: Task, sql: str, golds: Sequence[str], databases: Sequence[SqlDatabase]) -> Grade:
        gold_rows = [[self._gold_rows(task, database, gold) for database in databases] for gold in golds]
        empty = float(not any(gold_rows[0]))
        if not sql:
            return self._grade("no query in the answer", empty_gold=empty)
        results: list[QueryResult] = []
        for database in databases:
            result = database.run(sql)
            if result.error is not None:
                timeout = float(result.timed_out)
                return self._grade(f"{database.name}: {result.error}"[:500], empty_gold=empty, timeout=timeout)
            results.append(result)
        for gold, rows_by_database in zip(golds, gold_rows, strict=True):
            ordered = ordered_at_top(gold) if self._ordered == "auto" else self._ordered
            pairs = zip(rows_by_database, results, strict=True)
            if all(self._same(rows, got.rows or (), ordered) for rows, got in pairs):
                return self._grade("", executes=1.0, match=1.0, empty_gold=empty)
        first = results[0].rows or ()
        rationale = f"other rows than the gold query: {len(first)} rows, {len(gold_rows[0][0])} expected"
        return self._grade(rationale, executes=1.0, empty_gold=empty)

    def _same(self, gold: Sequence[Row], given: Sequence[Row], ordered: bool) -> bool:
        return results_match(gold, given, ordered=ordered, columns=self._columns, tolerance=self._tolerance)

    def _gold_rows(self, task: Task, database: SqlDatabase, gold: str) -> tuple[Row, ...]:
        result = database.run(gold)
        if result.rows is None:
            hint = "; raise max_value_bytes" if "too big" in (result.error or "") else ""
            raise GradeError(f"task {task.id!r}: its gold query fails on {database.name}: {result.error}{hint}")
        return result.rows

    def _grade(
        self, rationale: str, *, executes: float = 0.0, match: float = 0.0, empty_gold: float, timeout: float = 0.0
    ) -> Grade:
        parts = {"executes": executes, "match": match, "empty_gold": empty_gold, "timeout": timeout}
        score = 1.0 if match else self._executes_score * executes
        return Grade(score=score, grader=self.name, parts=parts, rationale=rationale)
