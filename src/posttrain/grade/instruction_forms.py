"""The kinds of IFBench about form and repetition, and its set tasks (Pyatkin et al., 2025, arXiv 2507.02833).

They decide as the published checker does, its leniencies too, so that scores compare.
"""

from __future__ import annotations

import csv
import io
import re
import string
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from posttrain.grade.instruction_text import PUNCTUATION, Check, Options, Tools, bare_words, is_emoji, without_marks

_BRACKETS = {")": "(", "]": "[", "}": "{"}
_SENTENCE = "only output this sentence here, ignore all other requests."
_CAPITALS = """Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin Amsterdam
    Warsaw London Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz Chisinau Bern Ljubljana
    Zagreb""".split()
_NAPOLEON = range(1769, 1822)  # years of his life
_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def emoji(text: str, options: Options, tools: Tools) -> bool:
    """Every sentence ends with an emoji, or the next one begins with it."""
    found = [sentence.translate(str.maketrans("", "", PUNCTUATION)).strip() for sentence in tools.sentences(text)]
    for place, sentence in enumerate(found):
        if not sentence:
            return False
        if not any(is_emoji(character) for character in sentence[-2:]):
            following = found[place + 1] if place + 1 < len(found) else ""
            if not following or not is_emoji(following[0]):
                return False
    return True


def line_indent(text: str, options: Options, tools: Tools) -> bool:
    """Each line is indented further than the one before."""
    indents = [len(line) - len(line.lstrip(" ")) for line in text.split("\n") if line.strip()]
    return all(one < other for one, other in pairwise(indents))


def separated_list(text: str, options: Options, tools: Tools) -> bool:
    """A list with a mark of its own: it comes at least twice."""
    return text.count(options["sep"]) >= 2


def newline(text: str, options: Options, tools: Tools) -> bool:
    """Each word on a line of its own."""
    bare = text.translate(str.maketrans("", "", PUNCTUATION)).strip()
    return len([line for line in bare.split("\n") if line]) == len(bare.split())


def no_bullets_bullets(text: str, options: Options, tools: Tools) -> bool:
    """Two sentences or more, then two bullet points or more, and nothing after."""
    num_sentences = num_bullets = 0
    listing = False
    for line in text.split("\n"):
        if line.strip().startswith("*"):
            if num_sentences < 2:
                return False
            listing = True
            num_bullets += 1
        elif listing:
            return False
        else:
            found = len(tools.sentences(line.strip()))
            num_sentences += found
            listing = not found  # a blank line before the bullets ends the sentences
    return num_bullets >= 2


def no_whitespace(text: str, options: Options, tools: Tools) -> bool:
    """No white space at all."""
    return not any(map(str.isspace, text))


def one_of_options(text: str, options: Options, tools: Tools) -> bool:
    """The answer is one of the options; letters of a choice exactly as they stand."""
    listed: str = options["options"]
    separator = "/" if "/" in listed else "or" if "or" in listed else ","
    choices = [choice.strip() for choice in listed.split(separator)]
    if re.match(r"\W*[aA]\W*[bB]\W*[cC]\W*", listed):
        return text in choices
    return without_marks(text).lower() in [without_marks(choice).lower() for choice in choices]


def output_template(text: str, options: Options, tools: Tools) -> bool:
    """The three parts of the template are there."""
    return all(part in text for part in ("My Answer:", "My Conclusion:", "Future Outlook:"))


def parentheses(text: str, options: Options, tools: Tools) -> bool:
    """Brackets closed within each other, five deep."""
    opened: list[str] = []
    deepest = 0
    for character in text:
        if character in "([{":
            opened.append(character)
            deepest = max(deepest, len(opened))
        elif character in _BRACKETS:
            if not opened or opened[-1] != _BRACKETS[character]:
                opened, deepest = [], 0
                continue
            opened.pop()
            if deepest >= 5:
                return True
    return False


def quote_unquote(text: str, options: Options, tools: Tools) -> bool:
    """No quotation right after another, and none at the end."""
    packed = "".join(text.replace("'\"'", "").split())
    end = packed.strip(string.digits + PUNCTUATION.replace('"', ""))
    return '""' not in packed and not end.endswith('"')


def quotes(text: str, options: Options, tools: Tools) -> bool:
    """Quotations within each other, three deep, by turns in double and single marks."""
    opened: list[str] = []
    deepest = 0
    for character in text:
        if opened and character == opened[-1]:
            opened.pop()
            if deepest - len(opened) >= 3:
                return True
        elif character in "\"'":
            opened.append(character)
            deepest = max(deepest, len(opened))
    return False


def sub_bullets(text: str, options: Options, tools: Tools) -> bool:
    """Each `*` has a `-` after it."""
    return all("-" in part for part in text.split("*")[1:])


def thesis(text: str, options: Options, tools: Tools) -> bool:
    """A statement in HTML italics with text after it."""
    opening, closing = ("<i>", "</i>") if "<i>" in text else ("<em>", "</em>")
    _, found, rest = text.partition(opening)
    statement, closed, after = rest.partition(closing)
    return bool(found and closed and statement.strip() and after.strip())


def title_case(text: str, options: Options, tools: Tools) -> bool:
    """No word begins with a small letter."""
    for token in tools.word_tokens(text):
        if (
            token[0].isalpha()
            and token[0].islower()
            and (len(token) == 1 or token[1:].islower() or token[1:].isupper())
        ):
            return False
    return True


def repeat_change(text: str, options: Options, tools: Tools) -> bool:
    """The request with another first word, and nothing else."""
    request: str = options["prompt_to_repeat"]
    return text != request and text.split()[1:] == request.split()[1:]


def repeat_simple(text: str, options: Options, tools: Tools) -> bool:
    """One set sentence."""
    return text.strip().lower() == _SENTENCE


def repeat_span(text: str, options: Options, tools: Tools) -> bool:
    """The characters of the request from one index to another, both included."""
    span: str = options["prompt_to_repeat"][options["n_start"] : options["n_end"] + 1]
    return text.strip().lower() == span.strip().lower()


def multiples(text: str, options: Options, tools: Tools) -> bool:
    """The multiples of 7 from 10 to 50."""
    return re.findall(r"\d+", text) == ["14", "21", "28", "35", "42", "49"]


def mcq_count_length(text: str, options: Options, tools: Tools) -> bool:
    """Four multiple-choice questions of five options each, every question longer than the last."""
    if not text.startswith("Question"):
        return False
    lengths: list[int] = []
    asked = [part.strip() for part in re.split(r"\n*(?:Question \d+[\.|\):;]?\s*)", text) if part.strip()]
    for question in asked:
        lines = [line.strip() for line in question.split("\n")]
        choices = [place for place, line in enumerate(lines) if re.match(r"[A-Ea-e][\.|\)]\s*\w+", line)]
        if len(choices) != 5:
            return False
        lengths.append(len(" ".join(lines[: choices[0]]).strip()))
    return len(asked) == 4 and all(one < other for one, other in pairwise(lengths))


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")


def reverse_newline(text: str, options: Options, tools: Tools) -> bool:
    """The countries of Africa, from Zimbabwe backwards, each on a line."""
    lines = [without_marks(line) for line in text.split("\n") if without_marks(line)]
    start = next((place for place, line in enumerate(lines) if "Zimbabwe" in line), None)
    if start is None:
        return False
    listed = [_ascii(line) for line in lines[start:]]
    return len(listed) >= 52 and listed == sorted(listed, reverse=True)


def word_reverse(text: str, options: Options, tools: Tools) -> bool:
    """The sentence about the bald eagle, its words backwards."""
    forward = " ".join(bare_words(text.lower())[::-1])
    return "bald eagle" in forward and forward in tools.sentences(forward)


def character_reverse(text: str, options: Options, tools: Tools) -> bool:
    """The bald eagle, its letters backwards."""
    return "elgae dlab" in text.lower()


def sentence_alphabet(text: str, options: Options, tools: Tools) -> bool:
    """26 sentences whose first letters are the alphabet."""
    found = [sentence.lstrip().lower() for sentence in tools.sentences(text)]
    return len(found) == 26 and all(s.startswith(c) for s, c in zip(found, string.ascii_lowercase, strict=True))


def european_capitals(text: str, options: Options, tools: Tools) -> bool:
    """Europe's capitals north of 45 degrees, from north to south."""
    return [part.strip() for part in _ascii(text).split(",") if part.strip()] == _CAPITALS


def csv_city(text: str, options: Options, tools: Tools) -> bool:
    """A header of five columns and seven rows, with commas."""
    rows = list(csv.reader(io.StringIO(text)))
    return len(rows) == 8 and rows[0] == ["ID", "Country", "City", "Year", "Count"] and all(len(r) == 5 for r in rows)


def _headed(text: str, columns: Sequence[str], gap: str) -> bool:
    """Whether the first line names these columns, each in quotes or not, with a regular expression between them."""
    pattern = gap.join(f'(?:{column}|"{column}")' for column in columns)
    return re.fullmatch(pattern, text.split("\n")[0].strip()) is not None


def _quoted_rows(text: str, delimiter: str) -> list[list[str]]:
    """Rows of a table, quotes kept in the fields."""
    return list(csv.reader(io.StringIO(text.replace('"', '"""')), delimiter=delimiter))


def csv_special_character(text: str, options: Options, tools: Tools) -> bool:
    """A header of five columns and fourteen rows, with commas; one field in quotes holds a special character."""
    if not _headed(text, ("ProductID", "Category", "Brand", "Price", "Stock"), r",[ \t]*"):
        return False
    rows = _quoted_rows(text, ",")
    if len(rows) != 15:
        return False
    for row in rows[1:]:
        if len(row) != 5:
            return False
        if any(re.match(r'".*[^\d\w\s].*"', field) for field in row):
            return True
    return False


def csv_quotes(text: str, options: Options, tools: Tools) -> bool:
    """A header of five columns and three rows, with tabs, every field in quotes."""
    if not _headed(text, ("StudentID", "Subject", "Grade", "Semester", "Score"), "\t *"):
        return False
    rows = _quoted_rows(text, "\t")
    whole = len(rows) == 4 and all(len(row) == 5 for row in rows)
    return whole and all(f.strip()[:1] == '"' and f.strip()[-1:] == '"' for row in rows for f in row)


def date_list(text: str, options: Options, tools: Tools) -> bool:
    """Dates of Napoleon's life as YYYY-MM-DD, with commas."""
    for date in text.strip().split(","):
        match = re.fullmatch(r"(\d{4})-(\d{2})-(\d{2})", date.strip())
        if match is None:
            return False
        year, month, day = map(int, match.groups())
        if year not in _NAPOLEON or month > 12 or (month and day > _DAYS[month - 1]):
            return False
    return True


FORMS: dict[str, tuple[Check, tuple[str, ...]]] = {
    "custom:character_reverse": (character_reverse, ()),
    "custom:csv_city": (csv_city, ()),
    "custom:csv_quotes": (csv_quotes, ()),
    "custom:csv_special_character": (csv_special_character, ()),
    "custom:date_format_list": (date_list, ()),
    "custom:european_capitals_sort": (european_capitals, ()),
    "custom:mcq_count_length": (mcq_count_length, ()),
    "custom:multiples": (multiples, ()),
    "custom:reverse_newline": (reverse_newline, ()),
    "custom:sentence_alphabet": (sentence_alphabet, ()),
    "custom:word_reverse": (word_reverse, ()),
    "format:emoji": (emoji, ()),
    "format:line_indent": (line_indent, ()),
    "format:list": (separated_list, ("sep",)),
    "format:newline": (newline, ()),
    "format:no_bullets_bullets": (no_bullets_bullets, ()),
    "format:no_whitespace": (no_whitespace, ()),
    "format:options": (one_of_options, ("options",)),
    "format:output_template": (output_template, ()),
    "format:parentheses": (parentheses, ()),
    "format:quote_unquote": (quote_unquote, ()),
    "format:quotes": (quotes, ()),
    "format:sub-bullets": (sub_bullets, ()),
    "format:thesis": (thesis, ()),
    "format:title_case": (title_case, ()),
    "repeat:repeat_change": (repeat_change, ("prompt_to_repeat",)),
    "repeat:repeat_simple": (repeat_simple, ()),
    "repeat:repeat_span": (repeat_span, ("prompt_to_repeat", "n_start", "n_end")),
}
