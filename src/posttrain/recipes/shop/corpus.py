"""The text that the base model is made from: the schema, the shop's own records, its queries and its questions.

As in continued pre-training on a company's documents: the schema, a glossary that says what single expressions mean in
SQL ("customers living in Paris" is `customers.city = 'Paris'`), records, and the logs of questions and of queries.
Nothing here pairs a question with its query: the two logs are separate documents, of the training combinations only.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from posttrain.core import generator
from posttrain.recipes.shop.database import SCHEMA
from posttrain.recipes.shop.grammar import AGGREGATES, ENDS, GROUPED, MEASURED, NOUNS, SIZE, TOPS
from posttrain.recipes.shop.language import (
    Question,
    any_value,
    combination_name,
    draw_phrase,
    every_value,
    from_clause,
    is_held_out,
)

# What a glossary entry is about, and how often.
KINDS = {"conditions": 7, "ranking": 5, "measure": 5, "grouping": 3}


def pretraining_texts(
    database: Path, questions: Sequence[Question], *, num_glossary: int, num_records: int, seed: int
) -> list[str]:
    """Documents to pre-train on, shuffled.

    Args:
        database: the shop, whose rows become sentences and INSERT statements.
        questions: their texts and their queries become separate documents.
        num_glossary: how many glossary entries.
        num_records: how many rows to describe.
        seed: decides which rows and the order.
    """
    draw = generator(seed, "shop corpus")
    documents = [statement.strip() + ";" for statement in SCHEMA.split(";") if statement.strip()] * 4
    records = list(_records(database))
    documents += draw.choices(records, k=num_records)
    documents += [_glossary_entry(draw) for _ in range(num_glossary)]
    documents += [question.text for question in questions]
    documents += [question.sql for question in questions]
    draw.shuffle(documents)
    return documents


def _glossary_entry(draw: random.Random) -> str:
    """What one expression means: a noun with conditions, a ranking, a measure or a grouping."""
    kind = draw.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    table = draw.choice(tuple(NOUNS))
    if kind == "conditions":
        phrase, _, where, joined = draw_phrase(draw, table, draw.choice((1, 2, 2)), any_value)
        return _card(phrase, f"{from_clause(table, joined)} {where}")
    column, word = draw.choice(tuple(MEASURED[table].items()))
    if kind == "ranking":
        order, end = draw.choice(tuple(ENDS.items()))
        size = draw.choice(every_value(SIZE))
        phrase, source = _filtered(draw, table, f"{TOPS[order]} {table}.{column}")
        words = (f"the {size} {phrase} with the {end} {word}", f"{TOPS[order]} {size} {phrase} by {word}")
        return _card(draw.choice(words), f"{source} ORDER BY {table}.{column} {order} LIMIT {size}")
    if kind == "measure":
        aggregate, adjectives = draw.choice(tuple(AGGREGATES.items()))
        phrase, source = _filtered(draw, table, f"{aggregate} {table}.{column}")
        return _card(f"{draw.choice(adjectives)} {word} of {phrase}", f"{aggregate}({table}.{column}) {source}")
    group, word = draw.choice(tuple(GROUPED[table].items()))
    phrase, source = _filtered(draw, table, f"count by {group}", group)
    return _card(f"{phrase} {draw.choice(('per', 'by'))} {word}", f"{source} GROUP BY {group}")


def _filtered(draw: random.Random, table: str, ask: str, group: str = "") -> tuple[str, str]:
    """A noun with at most two conditions, never such as make a held-out combination with what is asked."""
    needs = (group.split(".")[0],) if group and not group.startswith(f"{table}.") else ()
    while True:
        phrase, conditions, where, joined = draw_phrase(
            draw, table, draw.choice((0, 1, 1, 2)), any_value, without=f"{group}="
        )
        if not is_held_out(combination_name(table, ask, conditions)):
            return phrase, f"{from_clause(table, (*needs, *joined))} {where}".strip()


def _card(expression: str, sql: str) -> str:
    """A glossary entry, in the form in which the assistant will be spoken to."""
    return f"<|im_start|>user\n{expression}<|im_end|>\n<|im_start|>assistant\n{sql}<|im_end|>\n"


def _records(database: Path) -> list[str]:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        rows = connection.execute("SELECT * FROM customers").fetchall()
        documents = [
            f"customer {name} living in {city} in the {segment} segment joined {joined} with credit {credit}\n"
            f"customers.name = '{name}' AND customers.city = '{city}' AND customers.segment = '{segment}' "
            f"AND customers.joined = {joined} AND customers.credit = {credit}"
            for _, name, city, segment, joined, credit in rows
        ]
        rows = connection.execute("SELECT * FROM suppliers").fetchall()
        documents += [
            f"supplier {name} based in {country} with a rating of {rating}\n"
            f"suppliers.name = '{name}' AND suppliers.country = '{country}' AND suppliers.rating = {rating}"
            for _, name, country, rating in rows
        ]
        rows = connection.execute("SELECT * FROM products").fetchall()
        documents += [
            f"product {name} of the {category} category with a price of {price} and {stock} in stock\n"
            f"products.name = '{name}' AND products.category = '{category}' AND products.price = {price} "
            f"AND products.stock = {stock}"
            for _, name, category, price, stock, _ in rows
        ]
        rows = connection.execute("SELECT * FROM orders").fetchall()
        documents += [
            f"order {number} marked {status} placed in {year} worth {total}\n"
            f"orders.id = {number} AND orders.status = '{status}' AND orders.year = {year} AND orders.total = {total}"
            for number, _, status, year, total in rows
        ]
        return documents
    finally:
        connection.close()
