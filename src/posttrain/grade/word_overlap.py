"""Graders of short answers in running text: by the words they share with an accepted answer, or by holding one.

Source: SQuAD's exact match and F1, Rajpurkar et al., 2016 (arXiv 1606.05250).
"""

from __future__ import annotations

import re
import string
import time
from collections import Counter
from collections.abc import Sequence

from posttrain.core import ConfigError, Grade, GradeCase, Task, Trajectory
from posttrain.grade.answer import accepted_answers, answer_text, binary, normalised, right, wrong

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
_APOSTROPHES = str.maketrans("", "", "'’`")


def answer_words(text: str) -> list[str]:
    """The words by which answers are compared: no case, no punctuation, no articles."""
    plain = normalised(text).translate(_APOSTROPHES).translate(_PUNCTUATION)
    return _ARTICLES.sub(" ", plain).split() or plain.split()


def word_f1(given: Sequence[str], gold: Sequence[str]) -> tuple[float, float, float]:
    """F1, precision and recall of words, each counted as often as it comes.

    2·p·r / (p + r) with p the share of the given words that are in gold and r the share of gold's that are given; 1
    where both are empty.
    """
    if not given or not gold:
        same = float(not given and not gold)
        return same, same, same
    shared = (Counter(given) & Counter(gold)).total()
    if not shared:
        return 0.0, 0.0, 0.0
    precision, recall = shared / len(given), shared / len(gold)
    return 2 * precision * recall / (precision + recall), precision, recall


class WordF1:
    """The F1 of the answer's words against the accepted answer that it is nearest to.

    Parts: `precision` and `recall` of that answer, and `exact`, 1 where all words are the same in the same order.

    Args:
        threshold: F1 from which the score is 1 and below which it is 0; None scores the F1 itself.
        name: the grader's name.
    """

    def __init__(self, threshold: float | None = None, name: str = "word_f1") -> None:
        if threshold is not None and not 0 < threshold <= 1:
            raise ConfigError(f"grader {name!r}: threshold must be above 0 and at most 1, not {threshold}")
        self.name = name
        self._threshold = threshold

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Compare; raises GradeError where the task has no answer."""
        started_s = time.perf_counter()
        given = answer_words(answer_text(trajectory))
        golds = [answer_words(answer) for answer in accepted_answers(trajectory.task)]
        f1, precision, recall = max(word_f1(given, gold) for gold in golds)
        score = f1 if self._threshold is None else float(f1 >= self._threshold)
        parts = {"precision": precision, "recall": recall, "exact": float(given in golds)}
        return Grade(score=score, grader=self.name, parts=parts, seconds=time.perf_counter() - started_s)

    def cases(self) -> Sequence[GradeCase]:
        """Gold answers, near misses, and one of which the F1 is known: 2 of 3 words given, 2 of 2 wanted: 0.8."""
        task = Task(id="capital", prompt="?", answer="New Delhi", facts={"answers": ["Delhi, the capital"]})
        known = 0.8 if self._threshold is None else float(self._threshold <= 0.8)
        half = 0.5 if self._threshold is None else float(self._threshold <= 0.5)
        return (
            right(task, "The new Delhi!"),
            right(task, "capital Delhi", "another accepted answer, words in another order"),
            GradeCase(task=task, text="in New Delhi", low=known - 1e-9, high=known + 1e-9, why="one word too many"),
            GradeCase(task=task, text="old delhi", low=half - 1e-9, high=half + 1e-9, why="one word of two"),
            wrong(task, "Mumbai"),
            wrong(task, ""),
        )


class Contains:
    """1 where an accepted answer stands in the answer as whole words, else 0: how search questions are often graded.

    Lenient by nature: an answer that names every candidate holds the right one too. `max_words` bounds that.

    Args:
        max_words: longest answer that can score, in words.
        name: the grader's name.
    """

    def __init__(self, max_words: int | None = None, name: str = "contains") -> None:
        if max_words is not None and max_words < 1:
            raise ConfigError(f"grader {name!r}: max_words must be at least 1, not {max_words}")
        self.name = name
        self._max_words = max_words

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Search; raises GradeError where the task has no answer."""
        started_s = time.perf_counter()
        given = answer_words(answer_text(trajectory))
        if self._max_words is not None and len(given) > self._max_words:
            return binary(self.name, False, started_s, f"{len(given)} words, {self._max_words} at most")
        held = any(_within(answer_words(answer), given) for answer in accepted_answers(trajectory.task))
        return binary(self.name, held, started_s)

    def cases(self) -> Sequence[GradeCase]:
        """Answers that hold it, and near misses."""
        task = Task(id="author", prompt="?", answer="Jane Austen", facts={"answers": ["Austen, J."]})
        cases = [
            right(task, "jane austen"),
            right(task, "The Jane Austen"),
            wrong(task, "Jane Austenite"),
            wrong(task, "Jane B. Austen", "not side by side"),
            wrong(task, "Austen Jane", "the other way round"),
            wrong(task, ""),
        ]
        if self._max_words is not None:
            cases.append(wrong(task, "Jane Austen" + " or another" * self._max_words, "too long"))
        return tuple(cases)


def _within(wanted: Sequence[str], given: Sequence[str]) -> bool:
    if not wanted:
        return False
    return any(list(given[i : i + len(wanted)]) == list(wanted) for i in range(len(given) - len(wanted) + 1))
