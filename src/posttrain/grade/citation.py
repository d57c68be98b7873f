"""The grader of citations: does the answer cite the sources that it should, and are its quotations in them?

Sources: citation precision and recall, Gao et al., 2023 (ALCE, arXiv 2305.14627), here against listed sources rather
than by an entailment model; quotations as in Menick et al., 2022 (GopherCite, arXiv 2203.11147).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from posttrain.core import Grade, GradeCase, GradeError, Task, Trajectory
from posttrain.grade.answer import answer_text, right, wrong

_MARK = re.compile(r"\[(\d{1,3}(?:\s*[,;]\s*\d{1,3})*)\](?!\()")
_QUOTED = re.compile(r"[\"“]([^\"“”]{12,}?)[\"”]")
_ELLIPSIS = re.compile(r"\s*(?:\.\.\.|…|\[\.\.\.\]|\[…\])\s*")


def citations_in(text: str) -> list[int]:
    """Numbers of the sources cited as `[1]` or `[1, 3]`, in order, each as often as it comes."""
    return [int(number) for marks in _MARK.findall(text) for number in re.split(r"\s*[,;]\s*", marks)]


def quotations_in(text: str) -> list[str]:
    """What stands in double quotes and is 12 characters or longer."""
    return _QUOTED.findall(text)


def quoted_from(quotation: str, source: str) -> bool:
    """Whether a quotation stands in a source, word for word; case, white space and marks at its ends are free.

    An ellipsis parts a quotation into pieces that must come in this order.
    """
    words, position = _plain(source), 0
    pieces = [_plain(piece) for piece in _ELLIPSIS.split(quotation)]
    for piece in (piece for piece in pieces if piece):
        found = words.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return any(pieces)


def _plain(text: str) -> str:
    text = text.replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'")


class Citations:
    """How well an answer cites: 1 where it cites just the sources that it should and quotes them truly.

    The task's facts: `sources`, a list of texts that the prompt shows as [1], [2] …; `cited`, the numbers of those that
    an answer should cite (optional: without it any source may be cited, but one must be).

    The score is the F1 of the sources cited against `cited`, or 1 where any source is cited and `cited` is not given;
    it is 0 where a cited source does not exist or a quotation stands in no source that is cited.

    Parts: `precision`, `recall`, `exist` (share of citations whose source is there), `quotations` (share that are true;
    1 where there are none).

    Args:
        need_quotation: whether an answer without a quotation scores 0.
        name: the grader's name.
    """

    def __init__(self, *, need_quotation: bool = False, name: str = "citations") -> None:
        self.name = name
        self._need_quotation = need_quotation

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Check; raises GradeError where the task has no sources, or `cited` names one that is not there."""
        started_s = time.perf_counter()
        sources, gold = _sources(trajectory.task)
        text = answer_text(trajectory)
        marks = citations_in(text)
        there = [number for number in marks if 1 <= number <= len(sources)]
        cited = set(there)
        quotations = quotations_in(text)
        true = [any(quoted_from(quote, sources[number - 1]) for number in cited) for quote in quotations]
        precision = (len(cited & gold) / len(cited) if gold else 1.0) if cited else 0.0
        recall = len(cited & gold) / len(gold) if gold else float(bool(cited))
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        parts = {
            "precision": precision,
            "recall": recall,
            "exist": len(there) / len(marks) if marks else 0.0,
            "quotations": sum(true) / len(true) if true else 1.0,
        }
        why = ""
        if len(there) < len(marks):
            why = f"cites sources that are not there: {sorted(set(marks) - cited)}"
        elif not all(true):
            why = f"quotes what its sources do not say: {quotations[true.index(False)][:100]!r}"
        elif self._need_quotation and not quotations:
            why = "quotes nothing"
        seconds = time.perf_counter() - started_s
        return Grade(score=0.0 if why else f1, grader=self.name, parts=parts, rationale=why, seconds=seconds)

    def cases(self) -> Sequence[GradeCase]:
        """Answers that cite well, and near misses."""
        sources = ["The oak is the largest tree of the park.", "Elms were felled in 1976.", "Nothing of note."]
        task = Task(id="trees", prompt="?", facts={"sources": sources, "cited": [1, 2]})
        quote = 'They say "the oak is the largest ... of the park" [1].'
        both = f"{quote} The elms went [2]."
        return (
            right(task, both),
            right(task, f"{quote} See also [1, 2]."),
            GradeCase(task=task, text=quote, low=2 / 3 - 1e-9, high=2 / 3 + 1e-9, why="one of two: F1 is 2·1·½ / 1½"),
            GradeCase(task=task, text=f"{both} And [3].", low=0.8 - 1e-9, high=0.8 + 1e-9, why="one too many"),
            wrong(task, f"{both} And [4].", "a source that is not there"),
            wrong(task, both.replace("largest", "oldest"), "a quotation that is not there"),
            wrong(task, both.replace("[1]", "[2]"), "a quotation from a source that is not cited"),
            wrong(task, f'{quote} The "largest of the oak" [2].'.replace("largest of the", "park has the largest")),
            wrong(task, "The oak is the largest.", "nothing is cited"),
            wrong(task, ""),
        )


def _sources(task: Task) -> tuple[list[str], set[int]]:
    sources = task.facts.get("sources")
    if not isinstance(sources, list | tuple) or not sources or not all(isinstance(text, str) for text in sources):
        raise GradeError(f"task {task.id!r}: facts['sources'] must be a list of texts, not {str(sources)[:80]!r}")
    gold = set(task.facts.get("cited", ()))
    if not gold <= set(range(1, len(sources) + 1)):
        raise GradeError(f"task {task.id!r}: facts['cited'] is {sorted(gold)}; there are sources 1 to {len(sources)}")
    return list(sources), gold
