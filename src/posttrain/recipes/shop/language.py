"""Questions and their queries, drawn from the grammar and split by construction.

A question is a *combination of clauses* (table, what is asked, which columns are filtered) filled with values. One
combination in five is held out, by a hash of its name, and so is one value in three of every open column. Training
questions use neither; evaluation questions use a held-out combination *and*, in open columns, held-out values only.
Traffic, what users ask of a served model, is drawn from everything.
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from posttrain.core import EvaluateError, generator
from posttrain.recipes.shop.grammar import (
    AGGREGATES,
    CONDITIONS,
    GROUPED,
    JOINED,
    JOINS,
    LISTED,
    MEASURED,
    NOUNS,
    SIZE,
    Condition,
    Values,
)

HELD_OUT_SHARE = 5  # one combination in five


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
    asks: list[_Ask] = []
    for column, plural in LISTED.get(table, {}).items():
        asks.append(
            _Ask(
                name=f"list {column}",
                templates=(
                    f"list the {plural} of {{np}}",
                    f"show the {plural} of all {{np}}",
                    f"give me the {plural} of {{np}}",
                    f"what are the {plural} of {{np}}",
                ),
                select=f"{table}.{column}",
            )
        )
    if table != "order_items":
        asks.append(
            _Ask(
                name="count",
                templates=(
                    "how many {np} are there",
                    "count the {np}",
                    "what is the number of {np}",
                    "how many {np} do we have",
                ),
                select="COUNT(*)",
            )
        )
    for column, words in MEASURED.get(table, {}).items():
        asks += _measures(table, column, words)
        asks += _ranks(table, column, words)
    if table == "order_items":
        asks.append(
            _Ask(
                name="units",
                templates=(
                    "how many units of {np} were sold",
                    "what is the number of units sold of {np}",
                    "total quantity sold of {np}",
                ),
                select="SUM(order_items.quantity)",
                needs="products",
            )
        )
    for group, (singular, plural) in GROUPED[table].items():
        asks += _groups(table, group, singular, plural)
    return asks


def _measures(table: str, column: str, words: tuple[str, ...]) -> Iterator[_Ask]:
    for aggregate, adjectives in AGGREGATES.items():
        if column == "rating" and aggregate != "AVG":  # five ratings: the extremes are the same in every shop
            continue
        heads = [f"{adjective} {word}" for adjective in adjectives for word in words if adjective != word]
        frames = ("what is the {head} of {{np}}", "find the {head} of {{np}}", "tell me the {head} of {{np}}")
        yield _Ask(
            name=f"{aggregate} {column}",
            templates=tuple(frame.format(head=head) for frame in frames for head in heads),
            select=f"{aggregate}({table}.{column})",
        )


def _ranks(table: str, column: str, words: tuple[str, ...]) -> Iterator[_Ask]:
    if column == "rating":  # ratings tie; a ranking by them would have no single answer
        return
    shown = "id" if table == "orders" else "name"
    for direction, ends, order in (("top", ("highest", "largest"), "DESC"), ("bottom", ("lowest", "smallest"), "ASC")):
        plural = LISTED[table][shown]
        templates = [f"list the {plural} of the {{k}} {{np}} with the {end} {word}" for end in ends for word in words]
        templates += [f"{direction} {{k}} {{np}} by {word}" for word in words]
        yield _Ask(
            name=f"{direction} {column}",
            templates=tuple(templates),
            select=f"{table}.{shown}",
            tail=f"ORDER BY {table}.{column} {order} LIMIT {{k}}",
        )


def _groups(table: str, group: str, singular: str, plural: str) -> Iterator[_Ask]:
    needs = group.split(".")[0]
    needs = needs if needs != table else ""
    if table == "order_items":
        yield _Ask(
            name=f"units by {group}",
            templates=(
                f"units sold of {{np}} per {singular}",
                f"how many units of {{np}} were sold for each {singular}",
            ),
            select=f"{group}, SUM(order_items.quantity)",
            tail=f"GROUP BY {group}",
            needs=needs,
            group=group,
        )
        return
    yield _Ask(
        name=f"count by {group}",
        templates=(
            f"how many {{np}} are there per {singular}",
            f"count the {{np}} by {singular}",
            f"number of {{np}} for each {singular}",
        ),
        select=f"{group}, COUNT(*)",
        tail=f"GROUP BY {group}",
        needs=needs,
        group=group,
    )
    yield _Ask(
        name=f"having {group}",
        templates=(f"which {plural} have more than {{k}} {{np}}", f"{plural} with over {{k}} {{np}}"),
        select=group,
        tail=f"GROUP BY {group} HAVING COUNT(*) > {{k}}",
        needs=needs,
        group=group,
    )
    for column, words in MEASURED[table].items():
        aggregate, adjectives = ("AVG", AGGREGATES["AVG"]) if column != "stock" else ("SUM", AGGREGATES["SUM"])
        yield _Ask(
            name=f"{aggregate} {column} by {group}",
            templates=tuple(
                f"{start}{adjective} {words[0]} of {{np}} {link} {singular}"
                for start in ("", "show the ", "what is the ")
                for adjective in adjectives
                if adjective != words[0]
                for link in ("per", "for each")
            ),
            select=f"{group}, {aggregate}({table}.{column})",
            tail=f"GROUP BY {group}",
            needs=needs,
            group=group,
        )


def _combination(table: str, ask: _Ask, conditions: Sequence[Condition]) -> str:
    return f"{table}|{ask.name}|{' '.join(sorted(condition.key for condition in conditions))}"


def _held_out(combination: str) -> bool:
    """One combination with a filter in five; those without a filter are the language's own words and stay in."""
    if combination.endswith("|"):
        return False
    return hashlib.sha256(combination.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _draw(draw: random.Random, pool: Callable[[Values], Sequence[str | int]]) -> tuple[str, str, str, tuple[str, ...]]:
    table = draw.choices(("customers", "products", "orders", "suppliers", "order_items"), (5, 6, 6, 2, 2))[0]
    ask = draw.choice(_ASKS[table])
    available = [c for c in (*CONDITIONS.get(table, ()), *JOINED.get(table, ())) if c.key != f"{ask.group}="]
    wanted = draw.choices((0, 1, 2), (1, 4, 4))[0]
    conditions: list[Condition] = []
    while len(conditions) < wanted and available:
        condition = draw.choice(available)
        conditions.append(condition)
        available = [other for other in available if other.column != condition.column]
    values = [draw.choice(pool(condition.values)) for condition in conditions]
    phrases = [
        draw.choice(condition.phrases).format(v=value) for condition, value in zip(conditions, values, strict=True)
    ]
    size = draw.choice(pool(SIZE))
    noun_phrase = f"{draw.choice(NOUNS[table])} {draw.choice((' ', ' and ')).join(phrases)}".strip()
    text = draw.choice(ask.templates).format(np=noun_phrase, k=size)
    joined = dict.fromkeys([ask.needs] * bool(ask.needs) + [c.table for c in conditions if c.table != table])
    parts = [f"SELECT {ask.select} FROM {table}", *(JOINS[(table, other)] for other in joined)]
    if conditions:
        clauses = [condition.sql(value) for condition, value in zip(conditions, values, strict=True)]
        parts.append("WHERE " + " AND ".join(clauses))
    if ask.tail:
        parts.append(ask.tail.format(k=size))
    tags = (table, ask.name.split()[0].lower(), f"{len(conditions)} filters", "join" if joined else "no join")
    return text, " ".join(parts), _combination(table, ask, conditions), tags


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
    pools: dict[Split, Callable[[Values], Sequence[str | int]]] = {
        Split.TRAIN: lambda values: values.train,
        Split.EVALUATION: lambda values: values.evaluation,
        Split.CORPUS: lambda values: values.train + values.evaluation,
        Split.TRAFFIC: lambda values: values.train + values.evaluation,
    }
    connections = [sqlite3.connect(f"file:{path}?mode=ro", uri=True) for path in databases]
    questions: list[Question] = []
    seen = set(exclude)
    try:
        for _ in range(60 * num + 1000):
            if len(questions) == num:
                return questions
            text, sql, combination, tags = _draw(draw, pools[split])
            held_out = _held_out(combination)
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
