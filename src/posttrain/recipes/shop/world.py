"""The quickstart's world: two databases, the questions of each split, and how an answer is judged."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.core import Sampling, Task, derive_seed, user
from posttrain.evaluate import Suite
from posttrain.grade import SqlResult
from posttrain.recipes.shop.corpus import pretraining_texts
from posttrain.recipes.shop.database import build_database
from posttrain.recipes.shop.language import Question, Split, make_questions

MAX_QUERY_TOKENS = 96
SUITE = "shop held-out"


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that the flywheel needs to know of the shop."""

    databases: tuple[Path, Path]  # the shop, and a second one with other rows
    training: tuple[Question, ...]
    development: tuple[Question, ...]  # of the training combinations; for curves, never for a claim
    evaluation: tuple[Question, ...]
    traffic: tuple[Question, ...]

    @property
    def grader(self) -> SqlResult:
        """Runs the model's SQL read-only on both databases and compares result multisets with the known answer's."""
        return SqlResult(self.databases, name="execution")


def build_world(folder: Path, seed: int, *, training: int, development: int, evaluation: int, traffic: int) -> World:
    """Build the databases and draw the questions; the same seed gives the same world."""
    databases = (
        build_database(folder / "shop.db", derive_seed(seed, "shop")),
        build_database(folder / "shop_second.db", derive_seed(seed, "second shop")),
    )
    trained = make_questions(Split.TRAIN, training + development, seed, databases=databases)
    return World(
        databases=databases,
        training=tuple(trained[:training]),
        development=tuple(trained[training:]),
        evaluation=tuple(make_questions(Split.EVALUATION, evaluation, seed, databases=databases)),
        traffic=tuple(make_questions(Split.TRAFFIC, traffic, seed, databases=databases)),
    )


def task_of(question: Question) -> Task:
    """A question as a task: the user's turn, and for the grader alone the query whose result is the known answer."""
    return Task(id=question.id, prompt=(user(question.text),), answer=question.sql, tags=question.tags)


def suite_of(name: str, questions: Sequence[Question], world: World, stop_tokens: Collection[int]) -> Suite:
    """A greedy evaluation of execution accuracy."""
    sampling = Sampling(max_tokens=MAX_QUERY_TOKENS, temperature=0.0, stop_tokens=tuple(sorted(stop_tokens)))
    return Suite(name, [task_of(question) for question in questions], sampling, world.grader)


def documents_of(world: World, seed: int) -> list[tuple[str, str]]:
    """The documents that the base model is made from, with ids."""
    logged = make_questions(Split.CORPUS, 2500, seed)
    texts = pretraining_texts(world.databases[0], logged, num_glossary=26_000, num_records=500, seed=seed)
    return [(f"document-{number}", text) for number, text in enumerate(texts)]
