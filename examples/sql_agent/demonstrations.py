"""What the model is shown: documents to make a base model of, and how a careless person works with a database."""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence

from questions import called_by, misspelt, words

from posttrain.core import Message, Task, ToolCall, assistant, generator, user

Schema = tuple[str, str, Sequence[str]]  # database, table, columns

# Of the agent that is shown: how often it looks before it asks, reads an error, looks after it found nothing, and picks
# from a list what is meant.
LOOKS_FIRST, READS_ERRORS, LOOKS_AFTER, PICKS = 0.25, 0.7, 0.4, 0.85


def demonstration(ask: Callable[[str, str, str], str], task: Task, place: int, seed: int) -> list[Message]:
    """How a careless person answers: guesses at spellings, sometimes looks, sometimes gives up.

    Args:
        ask: what a tool answers: from the database's name, the tool's and its argument.
        task: a question.
        place: of the demonstration among those of the question.
        seed: decides what the person does.
    """
    facts, draw = task.facts, generator(seed, "demonstration", task.id, place)
    table, value = facts["table"], facts["said"]
    column = "_".join(facts["called"].split())
    messages = [user(task.prompt_text())]

    def call(tool: str, argument: str) -> str:
        arguments = {"sql" if tool == "query" else "table": argument}
        messages.append(Message(role="assistant", tool_calls=(ToolCall(name=tool, arguments=arguments),)))
        messages.append(Message(role="tool", content=ask(facts["database"], tool, argument), name=tool))
        return messages[-1].content

    def pick() -> str:
        call("query", f"SELECT DISTINCT {column} FROM {table}")
        return str(facts["value"] if draw.random() < PICKS else draw.choice(facts["values"]))

    if column != facts["column"] and draw.random() < LOOKS_FIRST:
        call("schema", table)
        column = facts["column"]
    if column == facts["column"] and draw.random() < LOOKS_FIRST:
        value = pick()
    for _ in range(3):
        found = call("query", f"SELECT {facts['select']} FROM {table} WHERE {column} = '{value}'")
        if found.startswith("Error") and column != facts["column"] and draw.random() < READS_ERRORS:
            column = facts["column"]  # the error says how it is spelt
        elif found in ("0", "NULL", "no rows") and value == facts["said"] and draw.random() < LOOKS_AFTER:
            value = pick()
        else:
            break
    return [*messages, assistant("done")]


def documents(schemas: Sequence[Schema], values: Sequence[str], num: int, seed: int) -> list[list[Message]]:
    """Documents of a base model that can spell, copy, and find in a list what is meant.

    Cards in the form of conversations, one or a few to a document, about real tables and made-up ones, real values and
    made-up ones: which value of a list is meant, which column, what a condition and what is asked for are in SQL. Of
    real tables they tell parts alone, never what a whole question is; and no card holds a call.

    Args:
        schemas: database, table and columns of every table that may be known.
        values: values that may be known.
        num: how many documents.
        seed: decides all of it.
    """
    draw = generator(seed, "documents")
    made = []
    for _ in range(num):
        cards = [card(draw, schemas, values) for _ in range(draw.choice((1, 1, 1, 2, 2, 3)))]
        made.append([message for each in cards for message in each])
    return made


def card(draw: random.Random, schemas: Sequence[Schema], values: Sequence[str]) -> list[Message]:
    """One thing to know, or two steps to it."""
    real = draw.random() < 0.4
    _, table, columns = draw.choice(schemas) if real else ("", made_name(draw), made_columns(draw))
    column, other = draw.choice(columns), draw.choice(columns)
    called = " ".join(words(column))
    joined = "_".join(called.split())
    meant, said, listed = remembered(draw, values)
    kind = draw.choices(("value", "column", "select", "condition", "look", "correction"), (4, 2, 1, 4, 6, 3))[0]
    if kind == "value":
        lines = "\n".join(listed)
        return [user(f"'{said}'\n{lines}" if draw.random() < 0.7 else f"{lines}\n'{said}'"), assistant(f"= '{meant}'")]
    telling = called_by(draw, column, columns)
    if kind == "column":
        return [user(f"{telling}\n{', '.join(columns)}"), assistant(column)]
    wanted = " ".join(words(other))
    asks = ((f"{wanted} of", "_".join(wanted.split())), (f"total {wanted} of", f"sum({'_'.join(wanted.split())})"))
    ask, select = draw.choice((*asks, asks[0], ("how many", "count(*)")))
    if kind == "select":
        return [user(f"{ask} {table}"), assistant(f"{select} FROM {table}")]
    ask, select = ("", "") if real else (f"{ask} ", f"{select} ")  # of real tables, parts alone

    def answer(name: str, value: str) -> Message:
        return assistant(f"{select}FROM {table} WHERE {name} = '{value}'")

    if kind == "condition":
        return [user(f"{ask}{table} with {called} '{said}'?"), answer(joined, said)]
    if kind == "look":
        asked = user(f"{ask}{table} with {called} '{said}'?")
        looks = [assistant(f"DISTINCT {joined} FROM {table}"), user("\n".join(listed))]
        return [asked, *looks, answer(joined, meant)]
    asked, guessed = user(f"{ask}{table} with {telling} '{said}'?"), answer("_".join(telling.split()), said)
    return [asked, guessed, user(f"no such column\n{', '.join(columns)}"), answer(column, said)]


def remembered(draw: random.Random, values: Sequence[str]) -> tuple[str, str, list[str]]:
    """A value, the same as somebody remembers it, and a list that has it."""
    listed = [draw.choice(values) if draw.random() < 0.3 else made_value(draw) for _ in range(draw.randint(2, 10))]
    meant = draw.choice(listed)
    said = misspelt(draw, meant, listed) if draw.random() < 0.8 else None
    return meant, said or meant, listed


def made_word(draw: random.Random) -> str:
    """A word of no language: two or three syllables."""
    return "".join(
        draw.choice("bcdfghjklmnprstvwxyz") + draw.choice("aeiou") + draw.choice(("", "", "n", "r", "s", "l", "m"))
        for _ in range(draw.choice((1, 2, 2, 3)))
    )


def made_value(draw: random.Random) -> str:
    """A value of no database: names of one to three words, some with a number, codes."""
    kind = draw.random()
    if kind < 0.08:
        return "".join(draw.choices(string.ascii_uppercase + string.digits, k=draw.randint(4, 8)))
    parts = [made_word(draw) for _ in range(draw.choice((1, 1, 2)))]
    parts = [part.capitalize() for part in parts] if kind < 0.8 else parts
    if draw.random() < 0.15:
        parts.insert(draw.choice((0, len(parts))), str(draw.randint(1, 999)))
    return draw.choice((" ", " ", " ", "_", ".", "-")).join(parts)


def made_name(draw: random.Random) -> str:
    """The name of a table or column: one to three words."""
    return "_".join(made_word(draw) for _ in range(draw.choice((1, 1, 2))))


def made_columns(draw: random.Random) -> list[str]:
    """The columns of a table of no database."""
    return [made_name(draw) for _ in range(draw.randint(3, 8))]
