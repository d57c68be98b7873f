"""Questions about the databases, made from their schemas and kept only where execution confirms the answer.

People seldom know how a database spells things. A question names a column by one of its words and a value as somebody
remembers it; which column and which value are meant, the database alone can tell.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from databases import TextColumn, number_columns, tables, text_columns

from posttrain.core import Task, generator
from posttrain.grade import QueryRunner

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


def words(name: str) -> list[str]:
    """The words of a column's name: `addr_city` and `sbCustCity` both end with `city`."""
    return [word.lower() for word in _WORD.findall(name)]


def questions(
    runner: QueryRunner, databases: dict[str, Path], *, per_value: int, seed: int, exact: float = 0.25
) -> list[Task]:
    """Questions that ask for a count, a column or a sum of the rows that have a certain value.

    The answer's query is `facts["sql"]`; only demonstrations and the judge see it. `facts` also tell how the question
    calls column and value, and how the database does.

    Args:
        runner: runs queries.
        databases: their files by name.
        per_value: questions about each value of each column.
        seed: decides what is asked, and how it is misspelt.
        exact: share of questions that spell the value as the database does.
    """
    made: list[Task] = []
    for database, path in databases.items():
        every = tables(path)
        for column in text_columns(database, path):
            asks = asked_of(path, column, every[column.table])
            for value in column.values:
                draw = generator(seed, "question", database, column.table, column.name, value)
                for number, (ask, select) in enumerate(draw.sample(asks, min(per_value, len(asks)))):
                    said = value if draw.random() < exact else misspelt(draw, value, column.values)
                    sql = f"SELECT {select} FROM {column.table} WHERE {column.name} = '{value}'"
                    found = runner.run(path, sql)
                    if said is None or not found.rows or all(cell is None for row in found.rows for cell in row):
                        continue
                    called = called_by(draw, column.name, every[column.table])
                    facts = {
                        "database": database,
                        "table": column.table,
                        "column": column.name,
                        "called": called,
                        "value": value,
                        "said": said,
                        "values": list(column.values),
                        "select": select,
                        "sql": [sql],
                    }
                    text = f"{ask} {column.table} with {called} '{said}'?"
                    name = f"{database}/{column.table}/{column.name}/{value}/{number}"
                    made.append(Task(id=name, prompt=text, facts=facts, cluster=value.lower()))
    return made


def asked_of(path: Path, column: TextColumn, columns: Sequence[str]) -> list[tuple[str, str]]:
    """What may be asked of the rows of a table: in words, and as what is selected."""
    others = [name for name in columns if name != column.name]
    plain = [(f"{' '.join(words(name))} of", name) for name in others if words(name)]
    sums = [(f"total {' '.join(words(name))} of", f"sum({name})") for name in number_columns(path, column.table)]
    return [("how many", "count(*)"), *sums, *plain]


def called_by(draw: random.Random, column: str, columns: Sequence[str]) -> str:
    """The words of a column's name, or one of them that no other column of the table has."""
    own = words(column)
    others = {word for name in columns if name != column for word in words(name)}
    telling = [word for word in own if word not in others and len(word) > 2]
    return draw.choice(telling) if len(own) > 1 and telling and draw.random() < 0.4 else " ".join(own)


def misspelt(draw: random.Random, value: str, values: Sequence[str]) -> str | None:
    """A value as somebody remembers it; None where it would be nearly as near to another one of the column."""
    said = value.lower() if draw.random() < 0.5 else value
    for _ in range(2 if len(value) > 8 and draw.random() < 0.3 else 1):
        places = [place for place in range(1, len(said) - 1) if said[place].isalpha()]
        if len(places) < 3:
            return None
        place = draw.choice(places)
        kind = draw.choice(("drop", "double", "swap"))
        if kind == "drop":
            said = said[:place] + said[place + 1 :]
        elif kind == "double":
            said = said[:place] + said[place] + said[place:]
        else:
            said = said[:place] + said[place + 1] + said[place] + said[place + 2 :]
    own = distance(said.lower(), value.lower())
    near = min((distance(said.lower(), other.lower()) for other in values if other != value), default=99)
    return said if said != value and near >= own + 2 else None


def distance(left: str, right: str) -> int:
    """Letters to drop, add or replace until one text is the other (Levenshtein)."""
    row = list(range(len(right) + 1))
    for place, letter in enumerate(left, start=1):
        before, row[0] = row[0], place
        for other, right_letter in enumerate(right, start=1):
            before, row[other] = row[other], min(row[other] + 1, row[other - 1] + 1, before + (letter != right_letter))
    return row[-1]


def split(tasks: Sequence[Task], seed: int) -> tuple[list[Task], list[Task], list[Task]]:
    """Tasks to show, to practise on and to hold out: a fifth, a half and three tenths of the values."""
    parts: tuple[list[Task], list[Task], list[Task]] = ([], [], [])
    for task in tasks:
        draw = generator(seed, "split", str(task.cluster)).random()
        parts[0 if draw < 0.2 else 1 if draw < 0.7 else 2].append(task)
    for part in parts:
        generator(seed, "order").shuffle(part)
    return parts


def human_questions(runner: QueryRunner, databases: dict[str, Path], source: Path) -> list[Task]:
    """The questions that people wrote, with every accepted query that runs."""
    made = []
    for name in ("questions_gen_sqlite", "instruct_basic_sqlite", "instruct_advanced_sqlite"):
        for place, line in enumerate((source / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            golds = [gold.strip() for gold in row["query"].split(";") if gold.strip()]
            golds = [gold for gold in golds if runner.run(databases[row["db_name"]], gold).rows is not None]
            facts = {"database": row["db_name"], "sql": golds}
            made.append(Task(id=f"{name}-{place}", prompt=row["question"], facts=facts))
    return made
