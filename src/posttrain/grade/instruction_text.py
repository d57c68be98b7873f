"""English text as the checkers of instructions see it: sentences, tokens, stop words, syllables, verbs, emoji.

The published checkers use NLTK's trained models here, which no package index carries. These are rules: `sentences` and
`word_tokens` follow the decisions of Punkt (Kiss and Strunk, 2006) and of the Penn Treebank tokenizer, and agree with
them on nearly all ordinary text, not on all. `Tools` takes other functions in their place.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from posttrain.core import MissingExtraError

PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_NO_PUNCTUATION = str.maketrans("", "", PUNCTUATION)

STOP_WORDS = frozenset(
    """i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves what which who whom this that these those am is are
    was were be been being have has had having do does did doing a an the and but if or because as until while
    of at by for with about against between into through during before after above below to from up down in out
    on off over under again further then once here there when where why how all any both each few more most
    other some such no nor not only own same so than too very s t can will just don should now d ll m o re ve y
    ain aren couldn didn doesn hadn hasn haven isn ma mightn mustn needn shan shouldn wasn weren won wouldn""".split()
)
PRONOUNS = frozenset(
    """i me we us you he him she her it they them my mine our ours your yours his hers its their theirs myself
    ourselves yourself yourselves himself herself itself themselves this that these those who whom whose which
    what whoever whomever whatever whichever anybody anyone anything everybody everyone everything nobody
    nothing somebody someone something each either neither both all some any none""".split()
)
_ABBREVIATIONS = frozenset(
    """a.m adj al apr approx assn aug ave avg b.c bldg bros c.e capt cf ch cm co col corp dec dept dr e.g ed eg est
    etc feb fig ft gen gov hon i.e ie inc jan jr jul jun lb lt ltd mar messrs mr mrs ms mt no nov oct op oz p.m
    ph.d pp prof rep rev s.t sec sen sep sept sgt sr st u.k u.n u.s u.s.a v viz vol vs""".split()
)
_BREAK = re.compile(r"(?P<before>\S*?)(?P<end>[.?!]+)(?P<close>[\"')\]}”’*_]*)(?P<gap>\s+)(?P<next>\S+)")
_TOKEN = re.compile(
    r"""
    \.\.\.+ | --+ | ``|''
  | (?:[A-Za-z]\.){2,}                              # U.S.
  | \d+(?:[.,:/]\d+)*(?:st|nd|rd|th)?\b
  | [^\W_]+(?:[-'’./&@_][^\W_]+)*                   # words, with what joins them
  | [^\w\s] | _+
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?i)^(.+?)(n['’]t|['’](?:s|m|d|ll|re|ve))$")
_ABBREVIATED = re.compile(r"(?:[A-Za-z]\.)+$|^[A-Z]\.$")
_EMOJI = re.compile(
    "[\U0001f000-\U0001faff\u2600-\u27bf\u2300-\u23ff\u2b00-\u2bff\u2190-\u21ff\u3030\u303d\u3297\u3299\u00a9\u00ae"
    "\u203c\u2049\u2122\u2139\u25aa-\u25fe\u200d\ufe0f\u20e3]"
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, with the marks that end them.

    A full stop ends a sentence unless an abbreviation or an initial carries it; `?` and `!` always do, line ends never.
    """
    found: list[str] = []
    start = position = 0
    text = text.strip()
    while match := _BREAK.search(text, position):
        if _ends_sentence(match):
            found.append(text[start : match.end("close")])
            start = match.start("next")
        position = match.start("next")
    if text[start:].strip():
        found.append(text[start:])
    return found


def _ends_sentence(match: re.Match[str]) -> bool:
    before, end, following = match["before"], match["end"], match["next"]
    if end != ".":
        # An ellipsis goes on where a small letter does.
        return not (set(end) == {"."} and not following[0].isupper())
    word = before.lstrip("\"'([{“‘*_").lower()
    if word.rpartition("-")[2] in _ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word != "i"):
        return False
    if re.fullmatch(r"(?:[a-z]\.)+[a-z]", word):
        return False
    return not (word.isdigit() and following[0].islower())


def word_tokens(text: str) -> list[str]:
    """Words, numbers and punctuation marks, each by itself; contractions in two (`do`, `n't`)."""
    found: list[str] = []
    for token in _TOKEN.findall(text):
        clitic = _CLITIC.match(token)
        found += [clitic[1], clitic[2]] if clitic else [token]
    return found


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


def bare_words(text: str) -> list[str]:
    """What white space parts, once all ASCII punctuation is gone."""
    return text.translate(_NO_PUNCTUATION).split()


def without_marks(text: str) -> str:
    """The text without ASCII punctuation and blanks around it."""
    return text.strip(PUNCTUATION + " ")


def is_emoji(character: str) -> bool:
    """Whether a character is an emoji or a part of one."""
    return bool(_EMOJI.match(character))


_VOWELS = re.compile(r"[aeiouy]+")
_SILENT_END = re.compile(r"[^aeiouy](?:e|(?<![sxzcg])(?<![sc]h)es|(?<![td])ed)$")
_SPOKEN_END = re.compile(r"[^aeiouyl]l(?:e|es)$")
_TWO_VOWELS = re.compile(r"i[ao](?!n$|ns$|us|u$|n[as]l)|eo(?!u)|iu|ua(?!r|l)|uo(?!s|y)|ying|[^cgqst]ien|creat|[dt]ui")
_SILENT_INSIDE = re.compile(r"[^aeiouy]e(?:ly|ful|less|ment|ments|some)$")
_SHORT = {"any": 2, "ago": 2, "era": 2, "ion": 2, "via": 2, "bio": 2, "duo": 2, "idea": 3, "area": 3, "every": 2}


@lru_cache(maxsize=8192)
def syllables(word: str) -> int:
    """Syllables of an English word, by its spelling; at least 1 for a word with letters."""
    letters = re.sub(r"[^a-z]", "", word.lower())
    if letters in _SHORT or len(letters) <= 3:
        return _SHORT.get(letters, min(1, len(letters)))
    count = len(_VOWELS.findall(letters)) + len(_TWO_VOWELS.findall(letters)) - len(_SILENT_INSIDE.findall(letters))
    if _SILENT_END.search(letters) and not _SPOKEN_END.search(letters):
        count -= 1
    return max(1, count)


_VERBS = frozenset(
    """accept access achieve acknowledge act adapt add address adjust admit adopt advise agree aim allow analyze
    announce answer appear apply appreciate approach arrange arrive ask assess assign assist assume attach
    attempt attend avoid bake balance base become begin believe belong blend boil book break bring build buy
    calculate call capture care carry cast catch celebrate challenge change charge chase check choose claim
    clean clear click climb close collect combine come commit communicate compare compile complete compose
    compute concentrate conduct confirm connect consider construct consult contact contain continue contribute
    convert convey convince cook copy correct count cover craft create cultivate cut dance deal decide declare
    decline decrease define deliver demonstrate depend describe design destroy determine develop die dig
    discover discuss display dive divide do document draft drag draw dream dress drink drive drop earn eat edit
    eliminate embrace emphasize employ empower enable encourage end engage enhance enjoy ensure enter escape
    establish estimate evaluate examine exceed excite exist expand expect experience explain explore express
    extend face fail fall feed feel fetch fight figure fill find finish fit fix fly focus fold follow force
    forget form foster gain gather generate get give go grab grasp grow guess guide handle happen harness have
    hear help hide highlight hire hit hold hope identify ignore illustrate imagine implement import improve
    include incorporate increase indicate influence inform insert inspire install integrate introduce invent
    invest investigate invite join jump justify keep know label laugh launch lead lean learn leave let leverage
    lie lift like limit link list listen live load locate look lose love maintain make manage mark master match
    maximize mean measure meet mention minimize mix modify monitor move navigate need negotiate note notice
    observe obtain occur offer open operate optimize order organize overcome own pack participate pass pause pay
    perform permit pick place plan plant play point post pour practice predict prefer prepare present preserve
    press prevent prioritize proceed produce program promise promote propose protect prove provide publish pull
    purchase push put raise reach react read realize receive recognize recommend record reduce refer reflect
    reject relate relax release remain remember remind remove repeat replace reply report represent request
    require research resolve respect respond rest return reveal review revise ride rise run save say scan
    schedule search see seek seem select sell send serve set settle shape share shift ship show simplify sing
    sit skip sleep slice smile solve sort speak specify spend split spread stand start state stay step stick
    stop strengthen strive struggle study submit succeed suggest suit summarize supply support suppose surround
    survive sweep swim take talk taste teach tell tend test thank think throw tie touch track train transform
    translate travel treat try turn type understand unite unleash unlock update upgrade use utilize validate
    vary verify visit visualize vote wait wake walk want warn wash watch wear welcome win wish wonder work worry
    wrap write yield be""".split()
)
_IRREGULAR = frozenset(
    """am is are was were been being has had having did done went gone made said saw seen took taken came gave
    given got gotten knew known thought told became left felt put brought began begun kept held wrote written
    stood heard meant met ran paid sat spoke spoken lay led read grew grown lost fell fallen sent built
    understood drew drawn broke broken spent caught bought rose risen drove driven chose chosen ate eaten fought
    flew flown threw thrown taught wore worn sang sung swam""".split()
)


def is_verb(word: str) -> bool:
    """Whether a word is a form of a common English verb (a list and its regular endings)."""
    word = word.lower()
    if word in _VERBS or word in _IRREGULAR:
        return True
    for ending, instead in (
        ("ies", "y"), ("es", ""), ("es", "e"), ("s", ""), ("ied", "y"), ("ed", ""), ("ed", "e"), ("ing", ""),
        ("ing", "e"), ("ying", "ie"),
    ):  # fmt: skip
        stem = word.removesuffix(ending) + instead
        if word.endswith(ending) and (
            stem in _VERBS or (len(stem) > 3 and stem[-1] == stem[-2] and stem[:-1] in _VERBS)
        ):
            return True
    return False


class LanguageUnknown(Exception):
    """A text holds nothing by which its language could be told."""


def detect_language(text: str) -> str:
    """The ISO 639-1 code of a text's language, by `langdetect`, which the published checkers use, with a fixed seed.

    Raises:
        MissingExtraError: langdetect is not installed.
        LanguageUnknown: the text has no letters to go by.
    """
    try:
        langdetect: Any = importlib.import_module("langdetect")
    except ImportError as error:
        raise MissingExtraError("langdetect", "instructions", "an instruction about the answer's language") from error
    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException as error:
        raise LanguageUnknown(str(error)) from error


class Tools(msgspec.Struct, frozen=True, kw_only=True):
    """What checkers ask about a language. Each may be replaced by something better that a user has."""

    sentences: Callable[[str], Sequence[str]] = sentences
    word_tokens: Callable[[str], Sequence[str]] = word_tokens
    syllables: Callable[[str], int] = syllables
    is_verb: Callable[[str], bool] = is_verb
    detect_language: Callable[[str], str] = detect_language


Options = dict[str, Any]  # an instruction's own arguments, by the names that the data sets use
Check = Callable[[str, Options, Tools], bool]
