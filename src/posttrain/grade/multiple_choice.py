"""The grader of multiple choice: finds the option that an answer chooses, in whatever form it says so."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.core import Grade, GradeCase, GradeError, Task, Trajectory
from posttrain.grade.answer import answer_text, binary, normalised, right, wrong
from posttrain.grade.number import boxed

_MAX_CHARACTERS = 20_000  # only the end of a longer answer is read
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARKS = r"[\s*_`$\"'“”(\[{:.\\]*"
_LEAD = (
    r"(?:final\s+answer|correct\s+(?:answer|option|choice)|best\s+(?:answer|option|choice)|answer|option|choice)"
    r"(?:\s+(?:to\s+the\s+question|is\s+therefore|here))?\s*"
)
_LABEL_AT_START = re.compile(r"^\s*\(?([A-Z])\s*[).:]\s*")
_NEGATION = re.compile(
    r"(?:\bnot|n't|\bnever|\brather\s+than|\binstead\s+of|\bwrong|\bincorrect|\bunlike)\W*$", re.IGNORECASE
)
_CHOOSING = rf"\b(?:choose|pick|select|choosing|go\s+with|opt\s+for)\s+(?:option|choice|letter|answer)?\s*{_MARKS}"
_IS_RIGHT = r"\)?\*{0,2}\s+is\s+(?:the\s+)?(?:correct|right|best)\b"


def chosen_option(text: str, options: Sequence[str]) -> int | None:
    """Which option an answer chooses, by index; None where it chooses none, or several at once.

    Looked for in turn: the last `\\boxed{…}`; the last "answer is (B)" or "Answer: B"; an answer that is a letter,
    alone or before the option's text; an answer that is an option's text; a last line that is one of these; the only
    letter in brackets; the only option whose text stands in the answer. A choice that is denied ("the answer is not B")
    is none.

    Args:
        text: the answer.
        options: the options' texts, with or without `(A)` before them.
    """
    text = text[-_MAX_CHARACTERS:]
    letters = LETTERS[: len(options)]
    texts = [normalised(_LABEL_AT_START.sub("", option)) for option in options]
    inside = boxed(text)
    if inside is not None:
        return _whole(re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", inside), letters, texts)
    said = _said(text, letters, texts)
    if said is not None:
        return said
    lines = [line for line in text.strip().split("\n") if line.strip()]
    for part in (text, lines[-1] if lines else "", lines[0] if lines else ""):
        found = _whole(part, letters, texts)
        if found is not None:
            return found
    bracketed = {match[1]: match.start() for match in re.finditer(rf"\(([{letters}])\)", text)}
    if len(bracketed) == 1:
        ((only, start),) = bracketed.items()
        return None if _NEGATION.search(text[max(0, start - 20) : start]) else letters.index(only)
    plain = f" {normalised(text)} "
    named = [
        place for place, option in enumerate(texts) if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", plain)
    ]
    # An option within another ("5" in "5 apples") is not named where the longer one is.
    longest = [n for n in named if not any(n != m and texts[n] in texts[m] for m in named)]
    return longest[0] if len(longest) == 1 else None


def _said(text: str, letters: str, texts: Sequence[str]) -> int | None:
    """The last "the answer is …" that names an option by letter or by text."""
    letter = (
        rf"\(?\[?([{letters}{letters.lower()}])(?![\w'’])"
        r"(?!\s*[<>=+^?]|\s*\\[a-z])"  # a variable of a formula
        rf"(?!\s*(?:and|or|,|/|&)\s*\(?[{letters}]\b)"  # one of several
    )
    found: list[tuple[int, bool, int]] = []  # where it is said, whether the whole line is the choice, which one
    linked = rf"\b{_LEAD}(?:(?:is|would\s+be|must\s+be|should\s+be|:|=|-|—|→)\s*)+"
    for match in re.finditer(rf"{linked}(?:(?:option|choice|letter|just)\s*)?{_MARKS}{letter}", text, re.IGNORECASE):
        # A letter is no choice where a sentence goes on from it: "the answer is a tree" chooses none.
        after = text[match.end(1) :]
        ends = re.match(r"[)\]}.,;:*_`$\"'\s]*(?:\n|$)|[)\]}]", after)
        if (match[1].isupper() and not re.match(r"\s+[a-z]", after)) or ends or match[1].upper() not in "AI":
            found.append((match.start(), False, letters.index(match[1].upper())))
    for pattern in (rf"{_CHOOSING}([{letters}])(?![\w'’])", rf"(?:^|[\s(*])([{letters}]){_IS_RIGHT}"):
        for match in re.finditer(pattern, text):
            found.append((match.start(), False, letters.index(match[1])))
    for match in re.finditer(rf"\b{_LEAD}(?:is|:|=)\s*([^\n]+)", text, re.IGNORECASE):
        place = _whole(match[1], letters, texts)
        if place is not None:
            found.append((match.start(), True, place))
    kept = [said for said in found if not _NEGATION.search(text[max(0, said[0] - 20) : said[0]])]
    return max(kept)[2] if kept else None


def _whole(text: str, letters: str, texts: Sequence[str]) -> int | None:
    """A text that is nothing but a choice: `B`, `(B)`, `B.`, `**B**`, `B) pears`, `option B`, `pears`."""
    text = text.strip().strip("*_`$\"'“” \t")
    match = re.fullmatch(rf"(?:option|choice|answer)?\s*[(\[]?([{letters}])[)\].:]*\**\.?", text, re.IGNORECASE)
    if match:
        return letters.index(match[1].upper())
    plain = normalised(text)
    if plain in texts and texts.count(plain) == 1:
        return texts.index(plain)
    match = re.match(rf"(?:option\s+)?[(\[]?([{letters}])(?:[)\].:]+|\s*[-–—:])\**\s*(\S.*)", text, re.DOTALL)
    if match is None:
        return None
    place = letters.index(match[1])
    # "B. pears, since …" chooses B; where other options are named in the same way, none is chosen by that alone.
    named = set(re.findall(rf"(?:^|\n)\s*[(\[]?([{letters}])[)\].:]\s|\(([{letters}])\)", text))
    return place if len({one or other for one, other in named}) <= 1 else None


class MultipleChoice:
    """1 where the option that the answer chooses is the right one, else 0.

    The task's facts: `options`, their texts in order. The task's answer is the right one's letter, text or index.

    Parts: `answered`, 1 where the answer chooses exactly one option.

    Args:
        name: the grader's name.
    """

    def __init__(self, name: str = "multiple_choice") -> None:
        self.name = name

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Find the choice; raises GradeError where the task does not say which option is right."""
        started_s = time.perf_counter()
        options, gold = _question(trajectory.task)
        given = chosen_option(answer_text(trajectory), options)
        if given is None:
            return binary(self.name, False, started_s, "no single option is chosen", answered=0.0)
        return binary(self.name, given == gold, started_s, f"chose {LETTERS[given]}", answered=1.0)

    def cases(self) -> Sequence[GradeCase]:
        """The same choice in many forms, and near misses."""
        options = ["apples", "pears", "a plum", "none of these"]
        task = Task(id="fruit", prompt="Which?", answer="B", facts={"options": options})
        forms = (
            "B", "b", "(B)", "B.", "B)", "**B**", "[B]", "Option B", "$B$", "B. pears", "(B) pears", "B: pears",
            "Pears.",
            "The answer is B", "The answer is (B).", "Answer: B", "**Answer:** B", "Final answer: **B**", "answer is b",
            "So the correct option is B because of the stone.", "\\boxed{B}", "\\boxed{\\text{(B)}}", "\\boxed{pears}",
            "A is wrong. C is wrong.\nThe answer is B.", "First I thought the answer is A. No: the answer is B.",
            "It is not (A).\n\n(B)", "I choose B", "They are pears", "B is correct.", "The answer is pears.",
            "Let us see.\n\nB. pears",
        )  # fmt: skip
        misses = (
            "A", "(C)", "The answer is A", "Answer: apples", "\\boxed{A}", "B or C", "The answer is A or B", "A and B",
            "",
            "I do not know", "E", "The answer is a pear tree? No, a plum: C", "(A) apples\n(B) pears\n(C) a plum",
            "The answer is B. Wait, the answer is C.", "The answer is not B", "Better", "apples and pears",
        )  # fmt: skip
        return (*(right(task, text) for text in forms), *(wrong(task, text) for text in misses))


def choice_task(row: Mapping[str, Any], *, id: str) -> Task:
    """A task for `MultipleChoice` from a row of AGIEval, MMLU, ARC and their like.

    Takes `options` or `choices`; `label`, `answer` or `gold` (a letter or an index); `passage`, `question` or `query`.
    """
    options = [_LABEL_AT_START.sub("", option) for option in row.get("options") or row["choices"]]
    gold = next(row[field] for field in ("label", "gold", "answer") if row.get(field) is not None)
    if isinstance(gold, int):  # an option's text may be a number too
        gold = LETTERS[gold]
    question = "\n".join(str(row[field]) for field in ("passage", "question", "query") if row.get(field))
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    task = Task(id=id, prompt=f"{question}\n{listed}", answer=str(gold), facts={"options": options})
    _question(task)
    return task


def _question(task: Task) -> tuple[list[str], int]:
    options = task.facts.get("options")
    if not isinstance(options, list | tuple) or not 2 <= len(options) <= len(LETTERS):
        raise GradeError(
            f"task {task.id!r}: facts['options'] must be a list of 2 to {len(LETTERS)} texts, not {options!r}"
        )
    texts = [str(option) for option in options]
    answer = (task.answer or "").strip()
    letter = answer.strip("().").upper()
    if len(letter) == 1 and letter in LETTERS[: len(texts)]:
        return texts, LETTERS.index(letter)
    if answer in texts:
        return texts, texts.index(answer)
    if answer.isdigit() and int(answer) < len(texts):
        return texts, int(answer)
    raise GradeError(f"task {task.id!r}: its answer {answer!r} is no letter, text or index of its {len(texts)} options")
