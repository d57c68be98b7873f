"""Questions and their queries, drawn from the grammar and split by construction.

A question is a *combination of clauses* (table, what is asked, which columns are filtered) filled with values. Of the
combinations with one condition one in ten is held out, of those with two one in five, by a hash of the name, and so is
one value in three of every open column. Training questions use neither; evaluation questions use a held-out combination
*and*, in open columns, held-out values only.
Traffic, what users ask of a served model, is drawn from everything.
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from posttrain.core import EvaluateError, generator
from posttrain.recipes.shop.grammar import (
    AGGREGATES,
    CONDITIONS,
    ENDS,
    GROUPED,
    JOINED,
    JOINS,
    LISTED,
    MEASURED,
    NOUNS,
    SIZE,
    TOPS,
    Condition,
    Values,
)

HELD_OUT = (0, 10, 5)  # by the number of conditions, one combination in so many; 0: none
FILTERS = (2, 5, 2)  # how often a question has no, one or two conditions
FILTERS_IN_TRAINING = (1, 3, 5)  # training questions are the harder ones

Pool = Callable[[Values], Sequence[str | int]]


def every_value(values: Values) -> tuple[str | int, ...]:
    """The values of training and of evaluation."""
    return values.train + values.evaluation


def any_value(values: Values) -> tuple[str | int, ...]:
    """Every value, and of an open number ten times as many: who reads them learns to copy, not to recall."""
    numbers = [value for value in every_value(values) if isinstance(value, int)]
    if not numbers or values.train == values.evaluation:
        return every_value(values)
    return tuple(range(10, max(numbers) + 1, 10))


class Split(StrEnum):
    """Which questions: disjoint training and evaluation, or the open stream of what users ask."""

    TRAIN = "train"
    CORPUS = "corpus"  # training combinations with any value: texts and queries of the pre-training corpus, unpaired
    EVALUATION = "evaluation"
    TRAFFIC = "traffic"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with the query that answers it."""

    id: str
    text: str
    sql: str
    combination: str  # of clauses, e.g. "products|AVG price|products.category= products.price>"
    tags: tuple[str, ...]
    held_out: bool


@dataclass(frozen=True, kw_only=True)
class _Ask:
    """What is asked: the templates of the question around the noun phrase `{np}`, and the parts of the query."""

    name: str
    templates: tuple[str, ...]
    select: str
    tail: str = ""  # after WHERE
    needs: str = ""  # a joined table that the select or the group needs
    group: str = ""  # the column that it groups by


def _asks(table: str) -> list[_Ask]:
    asks = [
        _Ask(
            name="count",
            templates=("how many {np} are there", "count the {np}", "what is the number of {np}"),
            select="COUNT(*)",
        )
    ]
    for column, plural in LISTED[table].items():
        asks.append(
            _Ask(
                name=f"list {column}",
                templates=(f"list the {plural} of {{np}}", f"show the {plural} of all {{np}}"),
                select=f"{table}.{column}",
            )
        )
        for measure, word in MEASURED[table].items():
            asks += _ranks(f"{table}.{column}", plural, f"{table}.{measure}", word)
    for measure, word in MEASURED[table].items():
        asks += _measures(f"{table}.{measure}", word)
    for group, word in GROUPED[table].items():
        asks += _groups(table, group, word)
    return asks


def _measures(column: str, word: str) -> Iterator[_Ask]:
    for aggregate, adjectives in AGGREGATES.items():
        yield _Ask(
            name=f"{aggregate} {column}",
            templates=tuple(
                f"{start} {adjective} {word} of {{np}}"
                for start in ("what is the", "find the")
                for adjective in adjectives
            ),
            select=f"{aggregate}({column})",
        )


def _ranks(shown: str, plural: str, column: str, word: str) -> Iterator[_Ask]:
    for order, direction in TOPS.items():
        templates = [f"list the {plural} of the {{k}} {{np}} with the {ENDS[order]} {word}"]
        yield _Ask(
            name=f"{direction} {column}",
            templates=(*templates, f"{direction} {{k}} {{np}} by {word}"),
            select=shown,
            tail=f"ORDER BY {column} {order} LIMIT {{k}}",
        )


def _groups(table: str, group: str, word: str) -> Iterator[_Ask]:
    needs = group.split(".")[0].replace(table, "")
    yield _Ask(
        name=f"count by {group}",
        templates=(f"how many {{np}} are there per {word}", f"count the {{np}} by {word}"),
        select=f"{group}, COUNT(*)",
        tail=f"GROUP BY {group}",
        needs=needs,
        group=group,
    )
    for column, measure in MEASURED[table].items():
        aggregate = "SUM" if column == "stock" else "AVG"
        yield _Ask(
            name=f"{aggregate} {column} by {group}",
            templates=tuple(
                f"{start} {adjective} {measure} of {{np}} per {word}"
                for start in ("show the", "what is the")
                for adjective in AGGREGATES[aggregate]
            ),
            select=f"{group}, {aggregate}({table}.{column})",
            tail=f"GROUP BY {group}",
            needs=needs,
            group=group,
        )


def combination_name(table: str, ask: str, conditions: Sequence[Condition]) -> str:
    """The name of a combination of clauses: table, what is asked, columns that are filtered."""
    return f"{table}|{ask}|{' '.join(sorted(condition.key for condition in conditions))}"


def is_held_out(combination: str) -> bool:
    """Decided by a hash of the name; combinations without a condition are the language's own words and stay in."""
    share = HELD_OUT[len(combination.rpartition("|")[2].split())]
    return bool(share) and int.from_bytes(hashlib.sha256(combination.encode()).digest()[:4]) % share == 0


def draw_phrase(
    draw: random.Random, table: str, num: int, pool: Pool, *, without: str = ""
) -> tuple[str, tuple[Condition, ...], str, tuple[str, ...]]:
    """A noun with conditions, "clients in Paris with credit above 300", and what it is in SQL.

    Args:
        draw: source of chance.
        table: what the noun means.
        num: how many conditions, on different columns.
        pool: which values may be named.
        without: key of a condition that is not used.

    Returns:
        The phrase, its conditions, the WHERE clause (empty without conditions), and the tables to join.
    """
    available = [c for c in (*CONDITIONS.get(table, ()), *JOINED.get(table, ())) if c.key != without]
    conditions: list[Condition] = []
    while len(conditions) < num and available:
        condition = draw.choice(available)
        conditions.append(condition)
        available = [other for other in available if other.column != condition.column]
    values = [draw.choice(pool(condition.values)) for condition in conditions]
    phrases = [draw.choice(c.phrases).format(v=value) for c, value in zip(conditions, values, strict=True)]
    phrase = f"{draw.choice(NOUNS[table])} {draw.choice((' ', ' and ')).join(phrases)}".strip()
    clauses = [c.sql(value) for c, value in zip(conditions, values, strict=True)]
    where = "WHERE " + " AND ".join(clauses) if clauses else ""
    joined = tuple(dict.fromkeys(c.table for c in conditions if c.table != table))
    return phrase, tuple(conditions), where, joined


def from_clause(table: str, joined: Iterable[str]) -> str:
    """`FROM orders JOIN customers ON …`."""
    return " ".join([f"FROM {table}", *(JOINS[(table, other)] for other in dict.fromkeys(joined))])


def _draw(draw: random.Random, pool: Pool, filters: tuple[int, ...]) -> tuple[str, str, str, tuple[str, ...]]:
    table = draw.choices(("customers", "products", "orders"), (1, 2, 2))[0]
    ask = draw.choice(_ASKS[table])
    num = draw.choices((0, 1, 2), filters)[0]
    phrase, conditions, where, joined = draw_phrase(draw, table, num, pool, without=f"{ask.group}=")
    joined = ((ask.needs,) if ask.needs else ()) + joined
    size = draw.choice(pool(SIZE))
    text = draw.choice(ask.templates).format(np=phrase, k=size)
    parts = [f"SELECT {ask.select}", from_clause(table, joined), where, ask.tail.format(k=size)]
    tags = (table, ask.name.split()[0].lower(), f"{len(conditions)} filters", "join" if joined else "no join")
    return text, " ".join(part for part in parts if part), combination_name(table, ask.name, conditions), tags


_ASKS = {table: _asks(table) for table in NOUNS}


def make_questions(
    split: Split, num: int, seed: int, *, databases: Sequence[Path] = (), exclude: frozenset[str] = frozenset()
) -> list[Question]:
    """Draw different questions of one split.

    Args:
        split: TRAIN and EVALUATION share no combination of clauses and no value of an open column; TRAFFIC is drawn
            from everything.
        num: how many.
        seed: the same seed gives the same questions.
        databases: where given, a question stays only if it has an answer in each of them and no two answers are the
            same, so that a query is hardly ever right by accident.
        exclude: question texts not to be drawn.

    Raises:
        EvaluateError: the language has too few different questions.
    """
    draw = generator(seed, "shop questions", split.value)
    pools: dict[Split, Pool] = {
        Split.TRAIN: lambda values: values.train,
        Split.EVALUATION: lambda values: values.evaluation,
        Split.CORPUS: every_value,
        Split.TRAFFIC: every_value,
    }
    filters = FILTERS_IN_TRAINING if split is Split.TRAIN else FILTERS
    connections = [sqlite3.connect(f"file:{path}?mode=ro", uri=True) for path in databases]
    questions: list[Question] = []
    seen = set(exclude)
    try:
        for _ in range(60 * num + 1000):
            if len(questions) == num:
                return questions
            text, sql, combination, tags = _draw(draw, pools[split], filters)
            held_out = is_held_out(combination)
            wrong_side = split is not Split.TRAFFIC and held_out != (split is Split.EVALUATION)
            if wrong_side or text in seen or not _tells(connections, sql):
                continue
            seen.add(text)
            questions.append(
                Question(
                    id=f"shop-{split.value}-{seed}-{len(questions)}",
                    text=text,
                    sql=sql,
                    combination=combination,
                    tags=tags,
                    held_out=held_out,
                )
            )
    finally:
        for connection in connections:
            connection.close()
    raise EvaluateError(f"the shop's language gave only {len(questions)} of {num} different {split.value} questions")


def _tells(connections: Sequence[sqlite3.Connection], sql: str) -> bool:
    """Whether every database has an answer, each another one."""
    answers = [sorted(connection.execute(sql).fetchall(), key=repr) for connection in connections]
    if not all(rows and rows not in ([(0,)], [(None,)]) for rows in answers):
        return False
    return len({repr(rows) for rows in answers}) == len(answers)


def combinations_of(questions: Sequence[Question]) -> frozenset[str]:
    """The combinations of clauses that occur in some questions."""
    return frozenset(question.combination for question in questions)
