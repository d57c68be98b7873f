"""The kinds of IFBench that count words and sentences (Pyatkin et al., 2025, arXiv 2507.02833).

They decide as the published checker does, its leniencies too, so that scores compare. Forms and set tasks are in
`instruction_forms`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from itertools import pairwise

from posttrain.grade.instruction_text import (
    PRONOUNS,
    PUNCTUATION,
    STOP_WORDS,
    Check,
    Options,
    Tools,
    bare_words,
    without_marks,
    words,
)

_CONJUNCTIONS = frozenset(("and", "but", "for", "nor", "or", "so", "yet"))
_NAMES = """Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander
    Amelia Benjamin Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel Ella
    Jacob Scarlett Nathan Victoria Elijah Layla Nicholas Audrey David Hannah Christopher Penelope
    Thomas Nora Andrew Aria Joseph Claire Ryan Stella Jonathan""".split()
_CONSONANT_CLUSTER = re.compile(r"[bcdfghjklmnpqrstvwxyz]{2}")
_JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
_PRIMES = frozenset(n for n in range(2, 98) if all(n % d for d in range(2, n)))


def conjunctions(text: str, options: Options, tools: Tools) -> bool:
    """At least so many different coordinating conjunctions, as written (`And` and `and` are two)."""
    used = {word for word in text.split() if without_marks(word).lower() in _CONJUNCTIONS}
    return bool(len(used) >= options["small_n"])


def keywords_multiple(text: str, options: Options, tools: Tools) -> bool:
    """Five keywords, exactly 1, 2, 3, 5 and 7 times."""
    keywords = [options[f"keyword{number}"].strip().lower() for number in range(1, 6)]
    return all(text.lower().count(word) == count for word, count in zip(keywords, (1, 2, 3, 5, 7), strict=True))


def numbers(text: str, options: Options, tools: Tools) -> bool:
    """Exactly so many numbers; one with a decimal point or commas is one."""
    return bool(len(re.findall(r"\d+", " ".join(bare_words(text)))) == options["N"])


def person_names(text: str, options: Options, tools: Tools) -> bool:
    """At least so many different names of a list of fifty."""
    return bool(sum(re.search(rf"\b{name}\b", text) is not None for name in _NAMES) >= options["N"])


def pronouns(text: str, options: Options, tools: Tools) -> bool:
    """At least so many pronouns."""
    tokens = tools.word_tokens(text.replace("/", " ").lower())
    return bool(sum(token in PRONOUNS for token in tokens) >= options["N"])


def punctuation(text: str, options: Options, tools: Tools) -> bool:
    """Every standard mark, and an interrobang besides."""
    if not any(mark in text for mark in ("!?", "?!", "‽")):
        return False
    rest = text.replace("?!", "", 1) if "?!" in text else text.replace("!?", "", 1)
    return set(".,!?;:") <= set(rest)


def unique_words(text: str, options: Options, tools: Tools) -> bool:
    """At least so many different words, in any case."""
    return bool(len({without_marks(word) for word in text.lower().split()}) >= options["N"])


def word_range(text: str, options: Options, tools: Tools) -> bool:
    """From so many to so many words."""
    return bool(options["min_words"] <= len(words(text)) <= options["max_words"])


def words_japanese(text: str, options: Options, tools: Tools) -> bool:
    """Every n-th word is Japanese, digits excepted."""
    every = [without_marks(word) for word in text.split()][options["N"] - 1 :: options["N"]]
    return all(_JAPANESE.search(word) for word in every if word and not word.isdigit())


def overlap(text: str, options: Options, tools: Tools) -> bool:
    """The share of the answer's character trigrams that a reference has too, in percent, within 2."""

    def trigrams(of: str) -> set[str]:
        return {of[i : i + 3] for i in range(len(of) - 2)}

    own = trigrams(text)
    if not own:
        return False
    share = 100 * len(own & trigrams(options["reference_text"])) / len(own)
    return bool(options["percentage"] - 2 <= share <= options["percentage"] + 2)


def _ends(text: str, tools: Tools) -> Counter[str]:
    return Counter(sentence[-1:] for sentence in tools.sentences(text))


def sentence_balance(text: str, options: Options, tools: Tools) -> bool:
    """As many sentences with a full stop as with a question mark and with an exclamation mark."""
    ends = _ends(text, tools)
    return ends["."] == ends["?"] == ends["!"]


def sentence_type(text: str, options: Options, tools: Tools) -> bool:
    """Twice as many sentences with a full stop as with a question mark."""
    ends = _ends(text, tools)
    return ends["."] == 2 * ends["?"]


def sentence_words(text: str, options: Options, tools: Tools) -> bool:
    """Three sentences of the same number of characters. (The published check does not look at the words.)"""
    lengths = [len(sentence.strip()) for sentence in tools.sentences(text)]
    return len(lengths) == 3 and len(set(lengths)) == 1


def stop_words(text: str, options: Options, tools: Tools) -> bool:
    """At most so many percent of the words are stop words."""
    tokens = words(text)
    return bool(tokens) and 100 * sum(t.lower() in STOP_WORDS for t in tokens) / len(tokens) <= options["percentage"]


def alliteration_increment(text: str, options: Options, tools: Tools) -> bool:
    """Each sentence has more words in alliterative runs than the one before."""
    previous = -1
    for sentence in tools.sentences(text):
        first = [word[0] for word in (w.lstrip(PUNCTUATION + " ") for w in sentence.lower().split()) if word]
        count, running = 0, False
        for one, other in pairwise(first):
            same = one == other
            count += (1 if running else 2) if same else 0
            running = same
        if count <= previous:
            return False
        previous = count
    return True


def increment(text: str, options: Options, tools: Tools) -> bool:
    """Each sentence has exactly so many words more than the one before."""
    counts = [len(bare_words(sentence)) for sentence in tools.sentences(text)]
    return bool(counts) and all(b == a + options["small_n"] for a, b in pairwise(counts))


def sentence_keyword(text: str, options: Options, tools: Tools) -> bool:
    """A keyword is in the n-th sentence."""
    found = tools.sentences(text)
    number = int(options["N"])
    if len(found) < number:
        return False
    return re.search(rf"\b{re.escape(options['word'])}\b", found[number - 1], re.IGNORECASE) is not None


def alphabet(text: str, options: Options, tools: Tools) -> bool:
    """Each word begins with the letter after the last one's, with `a` after `z`."""
    first = [word[0].lower() for word in bare_words(text)]
    letters = string.ascii_lowercase
    if not first or first[0] not in letters:
        return False
    start = letters.index(first[0])
    return all(letter == letters[(start + place) % 26] for place, letter in enumerate(first))


def consonants(text: str, options: Options, tools: Tools) -> bool:
    """Every word has two consonants side by side."""
    return all(_CONSONANT_CLUSTER.search(word) for word in text.lower().split())


def keyword_position(text: str, options: Options, tools: Tools) -> bool:
    """A keyword is the m-th word of the n-th sentence."""
    found = tools.sentences(text)
    if len(found) < options["n"]:
        return False
    tokens = [token for token in tools.word_tokens(found[options["n"] - 1]) if any(map(str.isalnum, token))]
    keyword: str = options["keyword"].strip().lower()
    return bool(len(tokens) >= options["m"] and tokens[options["m"] - 1].lower() == keyword)


def last_first(text: str, options: Options, tools: Tools) -> bool:
    """The last word of each sentence is the first of the next."""
    found = tools.sentences(text)
    for one, other in pairwise(found):
        last, first = one.rstrip(PUNCTUATION + " ").split(), other.lstrip(PUNCTUATION + " ").split()
        if not last or not first or last[-1].lower() != first[0].lower():
            return False
    return True


def no_consecutive(text: str, options: Options, tools: Tools) -> bool:
    """No two words side by side begin with the same letter."""
    found = bare_words(text.lower())
    return all(one[0] != other[0] for one, other in pairwise(found))


def odd_even_syllables(text: str, options: Options, tools: Tools) -> bool:
    """Words of odd and of even numbers of syllables by turns."""
    parities = [tools.syllables(word) % 2 for word in bare_words(text.lower())]
    return all(one != other for one, other in pairwise(parities))


def palindromes(text: str, options: Options, tools: Tools) -> bool:
    """At least ten palindromes of five letters or more."""
    return sum(len(word) >= 5 and word == word[::-1] for word in bare_words(text.lower())) >= 10


def paragraph_last_first(text: str, options: Options, tools: Tools) -> bool:
    """Each line ends with the word that it begins with."""
    lines = [without_marks(line.strip().lower()).split() for line in text.split("\n")]
    return all(line[0] == line[-1] for line in lines if line)


def prime_lengths(text: str, options: Options, tools: Tools) -> bool:
    """The length of every word is a prime number."""
    return all(len(word) in _PRIMES for word in bare_words(text))


def repeats(text: str, options: Options, tools: Tools) -> bool:
    """No word comes more often than so many times."""
    return bool(max(Counter(bare_words(text.lower())).values(), default=0) <= options["small_n"])


def start_verb(text: str, options: Options, tools: Tools) -> bool:
    """The answer begins with a verb."""
    tokens = tools.word_tokens(text)
    return bool(tokens) and tools.is_verb(tokens[0])


def vowel(text: str, options: Options, tools: Tools) -> bool:
    """One paragraph with at most three of the five vowels."""
    return "\n" not in text.strip() and len(set(text.lower()) & set("aeiou")) <= 3


def words_position(text: str, options: Options, tools: Tools) -> bool:
    """A keyword is the second word and the last but one; a mark at the end does not count."""
    tokens = [token.lower() for token in tools.word_tokens(text)]
    if tokens and tokens[-1] in PUNCTUATION:
        tokens = tokens[:-1]
    return len(tokens) >= 2 and tokens[1] == tokens[-2] == options["keyword"].strip().lower()


COUNTING: dict[str, tuple[Check, tuple[str, ...]]] = {
    "count:conjunctions": (conjunctions, ("small_n",)),
    "count:keywords_multiple": (keywords_multiple, ("keyword1", "keyword2", "keyword3", "keyword4", "keyword5")),
    "count:numbers": (numbers, ("N",)),
    "count:person_names": (person_names, ("N",)),
    "count:pronouns": (pronouns, ("N",)),
    "count:punctuation": (punctuation, ()),
    "count:unique_word_count": (unique_words, ("N",)),
    "count:word_count_range": (word_range, ("min_words", "max_words")),
    "count:words_japanese": (words_japanese, ("N",)),
    "ratio:overlap": (overlap, ("reference_text", "percentage")),
    "ratio:sentence_balance": (sentence_balance, ()),
    "ratio:sentence_type": (sentence_type, ()),
    "ratio:sentence_words": (sentence_words, ()),
    "ratio:stop_words": (stop_words, ("percentage",)),
    "sentence:alliteration_increment": (alliteration_increment, ()),
    "sentence:increment": (increment, ("small_n",)),
    "sentence:keyword": (sentence_keyword, ("word", "N")),
    "words:alphabet": (alphabet, ()),
    "words:consonants": (consonants, ()),
    "words:keywords_specific_position": (keyword_position, ("keyword", "n", "m")),
    "words:last_first": (last_first, ()),
    "words:no_consecutive": (no_consecutive, ()),
    "words:odd_even_syllables": (odd_even_syllables, ()),
    "words:palindrome": (palindromes, ()),
    "words:paragraph_last_first": (paragraph_last_first, ()),
    "words:prime_lengths": (prime_lengths, ()),
    "words:repeats": (repeats, ("small_n",)),
    "words:start_verb": (start_verb, ()),
    "words:vowel": (vowel, ()),
    "words:words_position": (words_position, ("keyword",)),
}
