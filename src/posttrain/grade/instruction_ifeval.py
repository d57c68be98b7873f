"""The 25 kinds of verifiable instruction of IFEval (Zhou et al., 2023, arXiv 2311.07911).

They decide as the published checker does, its leniencies too, so that scores compare.
"""

from __future__ import annotations

import json
import re

from posttrain.grade.instruction_text import Check, LanguageUnknown, Options, Tools, words


def _related(count: int, relation: str, bound: int) -> bool:
    """`less than` or `at least`, the two relations that the data knows."""
    return count < bound if relation == "less than" else count >= bound


def keywords_exist(text: str, options: Options, tools: Tools) -> bool:
    """Every keyword is in the answer, in any case."""
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in options["keywords"])


def keyword_frequency(text: str, options: Options, tools: Tools) -> bool:
    """A keyword comes so often."""
    count = len(re.findall(options["keyword"], text, re.IGNORECASE))
    return _related(count, options["relation"], options["frequency"])


def forbidden_words(text: str, options: Options, tools: Tools) -> bool:
    """None of the words is in the answer as a word."""
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in options["forbidden_words"])


def letter_frequency(text: str, options: Options, tools: Tools) -> bool:
    """A letter comes so often, in any case."""
    return _related(text.lower().count(options["letter"].lower()), options["let_relation"], options["let_frequency"])


def response_language(text: str, options: Options, tools: Tools) -> bool:
    """The whole answer is in one language; a text without letters passes."""
    try:
        return bool(tools.detect_language(text) == options["language"])
    except LanguageUnknown:
        return True


def number_sentences(text: str, options: Options, tools: Tools) -> bool:
    """So many sentences."""
    return _related(len(tools.sentences(text)), options["relation"], options["num_sentences"])


def number_paragraphs(text: str, options: Options, tools: Tools) -> bool:
    """So many paragraphs, with `***` between them and none empty but the first and the last."""
    paragraphs = re.split(r"\s?\*\*\*\s?", text)
    if any(not paragraph.strip() for paragraph in paragraphs[1:-1]):
        return False
    return bool(sum(bool(paragraph.strip()) for paragraph in paragraphs) == options["num_paragraphs"])


def number_words(text: str, options: Options, tools: Tools) -> bool:
    """So many words."""
    return _related(len(words(text)), options["relation"], options["num_words"])


def nth_paragraph_first_word(text: str, options: Options, tools: Tools) -> bool:
    """So many paragraphs, with blank lines between them, of which the n-th begins with a word."""
    paragraphs = text.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    number = options["nth_paragraph"]
    if count != options["num_paragraphs"] or number > count or not paragraphs[number - 1].strip():
        return False
    first = paragraphs[number - 1].split()[0].lstrip("'").lstrip('"')
    return bool(re.split(r"[.,?!'\"]", first)[0].lower() == options["first_word"].lower())


def number_placeholders(text: str, options: Options, tools: Tools) -> bool:
    """At least so many placeholders in square brackets."""
    return bool(len(re.findall(r"\[.*?\]", text)) >= options["num_placeholders"])


def postscript(text: str, options: Options, tools: Tools) -> bool:
    """A postscript with its marker."""
    marker = options["postscript_marker"]
    patterns = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = patterns.get(marker, r"\s*" + marker.lower() + r".*$")
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


def number_bullets(text: str, options: Options, tools: Tools) -> bool:
    """Exactly so many lines that begin with `*` or `-`."""
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return bool(len(stars) + len(dashes) == options["num_bullets"])


def constrained_response(text: str, options: Options, tools: Tools) -> bool:
    """One of three set answers is given."""
    return any(f"My answer is {answer}." in text for answer in ("yes", "no", "maybe"))


def number_highlights(text: str, options: Options, tools: Tools) -> bool:
    """At least so many sections highlighted with `*…*` or `**…**`."""
    single = [found for found in re.findall(r"\*[^\n\*]*\*", text) if found.strip("*").strip()]
    double = [found for found in re.findall(r"\*\*[^\n\*]*\*\*", text) if found[2:-2].strip()]
    return bool(len(single) + len(double) >= options["num_highlights"])


def multiple_sections(text: str, options: Options, tools: Tools) -> bool:
    """At least so many sections, each headed by a word and a number."""
    head = rf"\s?{options['section_spliter']}\s?\d+\s?"
    return bool(len(re.split(head, text)) - 1 >= options["num_sections"])


def json_format(text: str, options: Options, tools: Tools) -> bool:
    """The whole answer is JSON, in a fence or not."""
    text = text.strip()
    for mark in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(mark)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str, options: Options, tools: Tools) -> bool:
    """A title in double angular brackets."""
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


def two_responses(text: str, options: Options, tools: Tools) -> bool:
    """Two different answers with six asterisks between them."""
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    given = [part.strip() for part in parts if part.strip()]
    return len(given) == 2 and given[0] != given[1]


def repeat_prompt(text: str, options: Options, tools: Tools) -> bool:
    """The answer begins with the request, word for word."""
    return text.strip().lower().startswith(options["prompt_to_repeat"].strip().lower())


def end_phrase(text: str, options: Options, tools: Tools) -> bool:
    """The answer ends with a phrase and nothing after it."""
    return text.strip().strip('"').lower().endswith(options["end_phrase"].strip().lower())


def capital_word_frequency(text: str, options: Options, tools: Tools) -> bool:
    """So many words in capitals."""
    count = sum(token.isupper() for token in tools.word_tokens(text))
    return _related(count, options["capital_relation"], options["capital_frequency"])


def english_capital(text: str, options: Options, tools: Tools) -> bool:
    """English, in capitals only."""
    return text.isupper() and response_language(text, {"language": "en"}, tools)


def english_lowercase(text: str, options: Options, tools: Tools) -> bool:
    """English, in small letters only."""
    return text.islower() and response_language(text, {"language": "en"}, tools)


def no_comma(text: str, options: Options, tools: Tools) -> bool:
    """No comma."""
    return "," not in text


def quotation(text: str, options: Options, tools: Tools) -> bool:
    """The whole answer stands in double quotes."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# Of each kind: its check, and the names of its options.
IFEVAL: dict[str, tuple[Check, tuple[str, ...]]] = {
    "change_case:capital_word_frequency": (capital_word_frequency, ("capital_frequency", "capital_relation")),
    "change_case:english_capital": (english_capital, ()),
    "change_case:english_lowercase": (english_lowercase, ()),
    "combination:repeat_prompt": (repeat_prompt, ("prompt_to_repeat",)),
    "combination:two_responses": (two_responses, ()),
    "detectable_content:number_placeholders": (number_placeholders, ("num_placeholders",)),
    "detectable_content:postscript": (postscript, ("postscript_marker",)),
    "detectable_format:constrained_response": (constrained_response, ()),
    "detectable_format:json_format": (json_format, ()),
    "detectable_format:multiple_sections": (multiple_sections, ("section_spliter", "num_sections")),
    "detectable_format:number_bullet_lists": (number_bullets, ("num_bullets",)),
    "detectable_format:number_highlighted_sections": (number_highlights, ("num_highlights",)),
    "detectable_format:title": (title, ()),
    "keywords:existence": (keywords_exist, ("keywords",)),
    "keywords:forbidden_words": (forbidden_words, ("forbidden_words",)),
    "keywords:frequency": (keyword_frequency, ("keyword", "frequency", "relation")),
    "keywords:letter_frequency": (letter_frequency, ("letter", "let_frequency", "let_relation")),
    "language:response_language": (response_language, ("language",)),
    "length_constraints:nth_paragraph_first_word": (
        nth_paragraph_first_word,
        ("num_paragraphs", "nth_paragraph", "first_word"),
    ),
    "length_constraints:number_paragraphs": (number_paragraphs, ("num_paragraphs",)),
    "length_constraints:number_sentences": (number_sentences, ("num_sentences", "relation")),
    "length_constraints:number_words": (number_words, ("num_words", "relation")),
    "punctuation:no_comma": (no_comma, ()),
    "startend:end_checker": (end_phrase, ("end_phrase",)),
    "startend:quotation": (quotation, ()),
}
