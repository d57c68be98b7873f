"""The shop: a small real database and the language in which people ask about it, for the text-to-SQL quickstart.

`database` builds two SQLite files with one schema and different rows; `language` is a grammar of questions and their
queries, split into training, traffic and evaluation by construction; `corpus` is the text a base model starts from.
"""

from posttrain.recipes.shop.corpus import pretraining_texts
from posttrain.recipes.shop.database import SCHEMA, build_database
from posttrain.recipes.shop.language import Question, Split, combinations_of, make_questions

__all__ = [
    "SCHEMA",
    "Question",
    "Split",
    "build_database",
    "combinations_of",
    "make_questions",
    "pretraining_texts",
]
