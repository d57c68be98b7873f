"""The quickstart's generator is honest: what is asked in evaluation is never asked, nor answered, in training."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest

from posttrain.data import check_contamination
from posttrain.grade import prove
from posttrain.recipes.shop import (
    Question,
    Split,
    build_database,
    combinations_of,
    grammar,
    make_questions,
    pretraining_texts,
)
from posttrain.recipes.shop.world import World, build_world, task_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("shop"), 0, training=1500, development=50, evaluation=400, traffic=200)


def _literals(sql: str) -> set[str]:
    """Values of open columns in a query: (column, value) as text."""
    closed = ("segment", "status", "joined", "year", "rating")
    found = re.findall(r"(\w+\.\w+) (?:=|>|<) ('[^']*'|\d+)", sql)
    return {f"{column} {value}" for column, value in found if column.split(".")[1] not in closed}


def test_training_and_evaluation_share_no_combination_and_no_open_value(world: World) -> None:
    training, evaluation = (*world.training, *world.development), world.evaluation
    assert not combinations_of(training) & combinations_of(evaluation)
    assert len(combinations_of(evaluation)) > 80
    trained = set().union(*(_literals(question.sql) for question in training))
    asked = set().union(*(_literals(question.sql) for question in evaluation))
    assert asked, "the evaluation asks about values of open columns"
    assert not trained & asked


def test_what_is_held_out_is_made_of_clauses_that_training_has(world: World) -> None:
    def clauses(questions: tuple[Question, ...]) -> set[str]:
        return {
            part
            for question in questions
            for part in (
                "|".join(question.combination.split("|")[:2]),
                *re.findall(r"\S+[=<>]", question.combination.split("|")[2]),
            )
        }

    missing = clauses(world.evaluation) - clauses(world.training)
    assert not missing, "held-out questions recombine known clauses; they do not use unknown ones"


def test_the_contamination_check_agrees_and_finds_a_planted_question(world: World) -> None:
    evaluation = [task_of(question) for question in world.evaluation]
    clean = check_contamination([task_of(question) for question in world.training], {"held-out": evaluation})
    assert all(match.kind != "exact" for match in clean.matches)
    planted = task_of(world.evaluation[0]).replace(id="planted")
    found = check_contamination([planted], {"held-out": evaluation})
    assert found.dropped == ("planted",)


def test_documents_hold_no_evaluation_question_and_pair_no_question_with_its_query(world: World) -> None:
    logged = make_questions(Split.CORPUS, 1500, 0)
    texts = pretraining_texts(world.databases[0], logged, num_glossary=3000, num_records=200, seed=0)
    evaluation = {question.text for question in world.evaluation} | {question.sql for question in world.evaluation}
    assert not evaluation & set(texts)
    questions = {question.text for question in logged}
    paired = [text for text in texts if "SELECT" in text and any(line in questions for line in text.split("\n"))]
    assert not paired
    assert not combinations_of(logged) & combinations_of(world.evaluation)


def test_every_query_answers_on_both_databases_and_the_answers_differ(world: World) -> None:
    first, second = (sqlite3.connect(path) for path in world.databases)
    for question in world.evaluation:
        ours, theirs = (sorted(map(repr, c.execute(question.sql).fetchall())) for c in (first, second))
        assert ours
        assert theirs
        assert ours != theirs, f"{question.sql}: right by accident on one database, it would be so on the other"
    first.close()
    second.close()


def test_the_language_has_joins_aggregates_grouping_and_ordering(world: World) -> None:
    for word in ("JOIN", "AVG(", "SUM(", "COUNT(", "GROUP BY", "ORDER BY", "LIMIT"):
        share = sum(word in question.sql for question in world.evaluation) / len(world.evaluation)
        assert share > 0.02, f"{word} in {share:.1%} of the questions"


def test_rankings_have_one_answer(tmp_path: Path) -> None:
    connection = sqlite3.connect(build_database(tmp_path / "a.db", 3))
    for table, column in (("customers", "credit"), ("products", "price"), ("products", "stock"), ("orders", "total")):
        rows, values = connection.execute(f"SELECT COUNT(*), COUNT(DISTINCT {column}) FROM {table}").fetchone()
        assert rows == values, f"{table}.{column} has ties"
    assert sum(connection.execute(f"SELECT COUNT(*) FROM {t}").fetchone()[0] for t in ("customers", "orders")) > 1000
    connection.close()


def test_the_same_seed_gives_the_same_world(tmp_path: Path) -> None:
    one, two = (build_database(tmp_path / f"{name}.db", 5) for name in "ab")
    dump = [list(sqlite3.connect(path).iterdump()) for path in (one, two)]
    assert dump[0] == dump[1]
    assert make_questions(Split.TRAIN, 40, 1) == make_questions(Split.TRAIN, 40, 1)
    assert make_questions(Split.TRAIN, 40, 1) != make_questions(Split.TRAIN, 40, 2)


def test_values_are_split_once_and_for_all() -> None:
    for values in (grammar.CITY, grammar.COUNTRY, grammar.PRICE, grammar.TOTAL):
        assert values.evaluation
        assert not set(values.train) & set(values.evaluation)


def test_the_grader_proves_itself_on_the_shop(world: World) -> None:
    assert prove(world.grader).ok
