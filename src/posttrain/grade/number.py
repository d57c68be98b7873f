"""Graders of numeric answers, as in GSM8K (Cobbe et al., 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from posttrain.core import ConfigError, Grade, GradeCase, GradeError, Task, Trajectory
from posttrain.grade.answer import accepted_answers, answer_text, binary, right, wrong

Extract = Literal["last", "####", "boxed"]

# A run of digits is cut off here before it is made a number: longer ones are noise, and arithmetic on them is slow.
_MAX_DIGITS = 60
_ROUNDING = Fraction(1, 10**6)
_MAX_CHARACTERS = 50_000  # only the end of a longer text is searched

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|(?<![\w.])\.\d+)"
_POWER_OF_TEN = r"(?:[eE](?P<exponent>[-+]?\d{1,3})(?!\d)|\s?(?:\*|×|x)\s?10\s?\^\s?(?P<power>-?\d{1,3})(?!\d))"
# A sign counts where no operand stands before it: "10-5" holds 10 and 5, "= -5" and "$-5" hold -5.
_NUMBER = re.compile(
    rf"""
    (?<![\w^])(?<!\d\.)                                  # no part of a word, exponent or longer number
    (?:(?<![\d)\]])(?P<sign>[-+]))?                      # sign
    (?:[$€£¥]\s?)?
    (?:(?<![\d)\]])(?P<inner_sign>[-+]))?                # sign after the currency
    (?:
        (?:(?P<whole>\d{{1,9}})\s?)?\\frac\{{(?P<frac_top>-?{_DECIMAL})\}}\{{(?P<frac_bottom>-?{_DECIMAL})\}}
      | (?P<mixed>\d{{1,9}})\s(?P<mixed_top>\d{{1,9}})/(?P<mixed_bottom>\d{{1,9}})(?![\d/.]\d)
      | (?P<top>{_DECIMAL})(?:\s?/\s?(?P<bottom>{_DECIMAL}))?{_POWER_OF_TEN}?
    )
    """,
    re.VERBOSE,
)
_SHORT_FRACTION = re.compile(r"\\[dt]?frac\s?(?:\{([^{}]*)\}|(\d))\s?(?:\{([^{}]*)\}|(\d))")
_REWRITES = (
    (re.compile(r"[−–—]"), "-"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s?\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!|,\\!)(?=\d{3})"), ","),
    (re.compile(r"\\(?:times|cdot)\b"), "×"),
    (re.compile(r"\^\s?\{([^{}]*)\}"), r"^\1"),
    (re.compile(r"\\(?:left|right|[$,;! ])"), " "),
    (re.compile(r"\^\s?\\circ|\\%|%|°|\\degree\b"), " "),
    (re.compile(r"\*\*(?=\D|$)|(?<!\d)\*\*(?=\d)|__|`"), " "),  # Markdown's bold and code, not a product
)
_BRACE = re.compile(r"\\\\|\\[{}]|(?P<box>\\(?:boxed|fbox)\s?\{)|(?P<open>\{)|(?P<close>\})")


def numbers_in(text: str) -> list[Fraction]:
    """Every number in a text, left to right, exact.

    Understands thousands separators, currency and percent signs, units, `1/2`, `1 1/2`, `\\frac{1}{2}`, `1.5e3`,
    `1.5 \\times 10^{3}`, the true minus sign, and a full stop at the end. A percentage is the number before the sign.
    """
    text = text[-_MAX_CHARACTERS:]
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _SHORT_FRACTION.sub(_braced_fraction, text)
    found = (_value(match) for match in _NUMBER.finditer(text))
    return [number for number in found if number is not None]


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{…}` that closes, braces balanced; None where there is none."""
    opened: list[int] = []  # where what stands in a box begins; 0 for any other brace
    start = end = 0
    for match in _BRACE.finditer(text):
        if match["box"] or match["open"]:
            opened.append(match.end() if match["box"] else 0)
        elif match["close"] and opened:
            begins = opened.pop()
            if begins > start:
                start, end = begins, match.start()
    return text[start:end] if start else None


class Number:
    """1 where the number in the answer equals the task's number, else 0.

    The task's answer may be a bare number with a unit (`"72"`, `"$1,200"`) or a whole GSM8K solution that ends in
    `#### 72`.

    Args:
        tolerance: largest difference that still counts as equal, relative to the gold number where that is above 1 in
            size and absolute below. None: whole numbers must be equal, others within 1e-6.
        extract: which number of the answer counts: the last one in the text; the first one after the last `####`; or
            the one in the last `\\boxed{…}`. An answer without it scores 0.
        name: the grader's name.
    """

    def __init__(self, tolerance: float | None = None, extract: Extract = "last", name: str = "number") -> None:
        if extract not in ("last", "####", "boxed"):
            raise ConfigError(f"grader {name!r}: extract must be 'last', '####' or 'boxed', not {extract!r}")
        if tolerance is not None and not 0 <= tolerance < 1:
            raise ConfigError(f"grader {name!r}: tolerance must be at least 0 and below 1, not {tolerance}")
        self.name = name
        self._tolerance = None if tolerance is None else Fraction(tolerance)
        self._extract = extract

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Compare; raises GradeError where the task's answer holds no single number."""
        started_s = time.perf_counter()
        golds = [_gold(trajectory.task, answer) for answer in accepted_answers(trajectory.task)]
        given = self._read(answer_text(trajectory))
        if given is None:
            return binary(self.name, False, started_s, f"no number found ({self._extract})", answered=0.0)
        correct = any(self._same(given, gold) for gold in golds)
        return binary(self.name, correct, started_s, "" if correct else f"answered {_shown(given)}", answered=1.0)

    def cases(self) -> Sequence[GradeCase]:
        """Gold answers in many dresses, and near misses, in the form that `extract` reads."""
        forms = {"last": "So the answer is {}", "####": "12 + 3 = 15\n#### {}", "boxed": "Thus \\boxed{{{}}}"}
        task = Task(id="apples", prompt="How many?", answer="6000 + 1200 = <<6000+1200=7200>>7200.\n#### 7,200")
        half = Task(id="half", prompt="What share?", answer="1/2")
        form = forms[self._extract]
        good = [(task, text) for text in ("7200", "7,200", "$7200", "7200.00", "7,200 apples", "7.2e3", "+7200.")]
        good += [(half, text) for text in ("1/2", "0.5", ".5", "\\frac{1}{2}", "\\dfrac12", "3/6")]
        bad = [(task, text) for text in ("7201", "-7200", "720", "72,000", "7.2", "many", "")]
        bad += [(half, text) for text in ("2", "1", "-0.5", "1 1/2", "\\frac{2}{1}", "0.05")]
        return (
            *(right(case, form.format(text)) for case, text in good),
            *(wrong(case, form.format(text)) for case, text in bad),
        )

    def _same(self, given: Fraction, gold: Fraction) -> bool:
        if given == gold:
            return True
        tolerance = self._tolerance
        if tolerance is None:
            if given.denominator == gold.denominator == 1:
                return False
            tolerance = _ROUNDING
        size = max(Fraction(1), abs(gold))
        return abs(given - gold) <= tolerance * size

    def _read(self, text: str) -> Fraction | None:
        if self._extract == "last":
            found = numbers_in(text)
            return found[-1] if found else None
        if self._extract == "boxed":
            inside = boxed(text)
            found = [] if inside is None else numbers_in(inside)
            return found[-1] if found else None
        _, marked, tail = text.rpartition("####")
        found = numbers_in(tail.strip().partition("\n")[0]) if marked else []
        return found[0] if found else None


def _gold(task: Task, answer: str) -> Fraction:
    found = numbers_in(answer.rpartition("####")[2])
    if len(found) != 1:
        raise GradeError(f"task {task.id!r}: its answer {answer[-80:]!r} holds {len(found)} numbers; Number needs one")
    return found[0]


def _braced_fraction(match: re.Match[str]) -> str:
    top, short_top, bottom, short_bottom = match.groups()
    return f"\\frac{{{(top or short_top or '').strip()}}}{{{(bottom or short_bottom or '').strip()}}}"


def _value(match: re.Match[str]) -> Fraction | None:
    """The number of one match; None where it is longer than any answer or divides by zero."""
    part = match.groupdict()
    pairs = (("frac_top", "frac_bottom"), ("mixed_top", "mixed_bottom"), ("top", "bottom"))
    top, bottom = next((part[top], part[bottom]) for top, bottom in pairs if part[top] is not None)
    if len(top) > _MAX_DIGITS or len(bottom or "") > _MAX_DIGITS:
        return None
    divisor = Fraction(bottom.replace(",", "")) if bottom else Fraction(1)
    if divisor == 0:
        return None
    number = Fraction(part["whole"] or part["mixed"] or 0) + Fraction(top.replace(",", "")) / divisor
    number *= Fraction(10) ** int(part["exponent"] or part["power"] or 0)
    return -number if (part["sign"] == "-") != (part["inner_sign"] == "-") else number


def _shown(number: Fraction) -> str:
    if number.denominator == 1:
        return str(number.numerator)
    return f"{number.numerator}/{number.denominator}"
