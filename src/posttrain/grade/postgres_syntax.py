"""What may be asked of PostgreSQL: one query, of functions that only calculate. Read as its own lexer reads.

Source: PostgreSQL 15 documentation, 4.1 Lexical Structure, and its lexer's rules for continued strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

SAFE_FUNCTIONS = frozenset(
    """abs acos acosd acosh age any_value array_agg array_append array_cat array_dims array_length array_lower
    array_ndims array_position array_positions array_prepend array_remove array_replace array_to_json
    array_to_string array_upper ascii asin asind asinh atan atan2 atan2d atand atanh avg bit bit_and bit_count
    bit_length bit_or bit_xor bool bool_and bool_or bpchar btrim cardinality cbrt ceil ceiling char char_length
    character_length chr clock_timestamp coalesce concat concat_ws corr cos cosd cosh cot cotd count covar_pop
    covar_samp cume_dist current_database current_schema date date_bin date_part date_trunc daterange decode
    degrees dense_rank difference div encode every exp extract factorial first_value float4 float8 floor format
    gcd generate_series generate_subscripts greatest initcap int2 int4 int4range int8 int8range interval
    isfinite json_agg json_array_elements json_array_elements_text json_array_length json_build_array
    json_build_object json_each json_each_text json_extract_path json_extract_path_text json_object
    json_object_agg json_object_keys json_strip_nulls json_typeof jsonb_agg jsonb_array_elements
    jsonb_array_elements_text jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text
    jsonb_extract_path jsonb_extract_path_text jsonb_object jsonb_object_agg jsonb_object_keys jsonb_path_exists
    jsonb_path_match jsonb_path_query jsonb_path_query_array jsonb_path_query_first jsonb_set jsonb_strip_nulls
    jsonb_typeof justify_days justify_hours justify_interval lag last_value lcm lead least left length
    levenshtein like ln log log10 lower lower_inc lower_inf lpad ltrim make_date make_interval make_time
    make_timestamp make_timestamptz max md5 metaphone min mod mode multirange normalize notlike now nth_value
    ntile nullif num_nonnulls num_nulls numeric numrange octet_length overlaps overlay percent_rank
    percentile_cont percentile_disc pg_typeof phraseto_tsquery pi plainto_tsquery position pow power quote_ident
    quote_literal quote_nullable radians range_agg range_merge rank regexp_count regexp_instr regexp_like
    regexp_match regexp_matches regexp_replace regexp_split_to_array regexp_split_to_table regexp_substr
    regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy replace reverse
    right round row_number row_to_json rpad rtrim scale sign similarity sin sind sinh soundex split_part sqrt
    starts_with statement_timestamp stddev stddev_pop stddev_samp string_agg string_to_array string_to_table
    strpos substr substring sum tan tand tanh text time timestamp timestamptz timetz timezone to_char to_date
    to_json to_jsonb to_number to_timestamp to_tsquery to_tsvector transaction_timestamp translate trim
    trim_array trim_scale trunc ts_headline ts_rank ts_rank_cd tsrange tstzrange unaccent unnest upper upper_inc
    upper_inf var_pop var_samp varbit varchar variance websearch_to_tsquery width_bucket word_similarity""".split()
)
_QUERY_WORDS = ("select", "with", "values", "table")
_UPPER_TO_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}
_NAME_BYTES = 63  # longer names are cut

# What begins with a quote is found here and ended by hand; whatever matches nothing is an operator's character.
_LEXEME = re.compile(
    r"""
    (?P<space>[ \t\n\r\f\v]+|--[^\n\r]*)
  | (?P<comment>/\*)
  | (?P<escaped>[eE]')
  | (?P<text>(?:[bBxXnN]|[uU]&)?')
  | (?P<unicode_name>[uU]&")
  | (?P<quoted>")
  | (?P<name>[A-Za-z_\u0080-\U0010ffff][\w$\u0080-\U0010ffff]*)
  | (?P<dollar>\$(?:[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_\u0080-\U0010ffff]*)?\$)
  | (?P<parameter>\$\d)
  | (?P<mark>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_ENDS = {
    "text": re.compile(r"(?:[^']|'')*'"),
    "escaped": re.compile(r"(?:[^'\\]|''|\\.)*'", re.DOTALL),
    "quoted": re.compile(r'((?:[^"]|"")*)"'),
}


class Refused(ValueError):
    """A query may not run; the message says why."""


class Token(NamedTuple):
    """A piece of SQL: "name" and "quoted" have the name as the server folds it, "mark" a character, others nothing."""

    kind: str
    text: str
    start: int


class Forbidden(NamedTuple):
    """What a database has that queries may not name."""

    functions: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()  # functions that `row.name` would call
    tables: frozenset[str] = frozenset()  # the server's own


def tokens(sql: str) -> list[Token]:
    """Names, texts and marks, without comments.

    Raises:
        Refused: a quote or comment is not closed, or a text cannot be read for sure.
    """
    found: list[Token] = []
    place = 0
    while place < len(sql):
        match = _LEXEME.match(sql, place)
        assert match is not None  # the last alternative takes any character
        kind, start = match.lastgroup or "", place
        place = match.end()
        if kind == "space":
            continue
        if kind == "comment":
            place = _after_comment(sql, start)
        elif kind == "unicode_name":
            raise Refused('not allowed: U&"…" names')
        elif kind == "parameter":
            raise Refused(f"not allowed: the parameter {match.group()}")
        elif kind == "dollar":
            end = sql.find(match.group(), place)
            if end < 0:
                raise Refused(f"a text is not closed: {match.group()}")
            place = end + len(match.group())
            found.append(Token("text", "", start))
        elif kind in _ENDS:
            # A text that follows an escaped one after a line break is read with its escapes, in which a quote may hide.
            if kind == "text" and found and found[-1].kind == "escaped":
                raise Refused("not allowed: a text right after an E'…' text")
            ended = _ENDS[kind].match(sql, place)
            if ended is None:
                raise Refused(f"a quote is not closed: {sql[start : start + 20]!r}")
            place = ended.end()
            name = ended.group(1).replace('""', '"') if kind == "quoted" else ""
            found.append(Token(kind, _cut(name), start))
        else:
            text = match.group()
            found.append(Token(kind, _cut(text.translate(_UPPER_TO_LOWER)) if kind == "name" else text, start))
    return found


def _cut(name: str) -> str:
    return name.encode("utf-8", "surrogatepass")[:_NAME_BYTES].decode("utf-8", "ignore")


def _after_comment(sql: str, start: int) -> int:
    """The end of a comment, in which others may be nested."""
    depth, place = 0, start
    for edge in _COMMENT_EDGE.finditer(sql, start):
        if edge.start() < place:
            continue
        depth += 1 if edge.group() == "/*" else -1
        place = edge.end()
        if depth == 0:
            return place
    raise Refused("a comment is not closed")


def authorised(sql: str, forbidden: Forbidden, allowed: Iterable[str] = ()) -> str:
    """The one query of a text, without its semicolon.

    It begins as queries do, its parentheses close, and it names no function and no table that is forbidden. That it is
    a query and nothing else is for the server's parser to say: the caller puts it in parentheses after FROM, where no
    other statement can stand.

    Args:
        sql: what somebody wrote.
        forbidden: what the database has that may not be named.
        allowed: names that may be, all the same.

    Raises:
        Refused: it may not run.
    """
    if "\0" in sql:
        raise Refused("not allowed: the character NUL")
    found = tokens(sql)
    end = next((place for place, token in enumerate(found) if token.text == ";" and token.kind == "mark"), len(found))
    if any(token.text != ";" or token.kind != "mark" for token in found[end:]):
        raise Refused("not allowed: only a single statement may run")
    query = found[:end]
    first = next((token for token in query if token.text != "(" or token.kind != "mark"), None)
    if first is None:
        raise Refused("no query")
    if first.kind != "name" or first.text not in _QUERY_WORDS:
        raise Refused(f"not allowed: only a single SELECT may run, not {sql[first.start : first.start + 20].strip()!r}")
    _balanced(query)
    _named(query, forbidden, frozenset(allowed))
    return sql if end == len(found) else sql[: found[end].start]


def _balanced(query: list[Token]) -> None:
    depth = 0
    for token in query:
        if token.kind == "mark":
            depth += (token.text == "(") - (token.text == ")")
        if depth < 0:
            raise Refused("a parenthesis closes that was not opened")
    if depth:
        raise Refused("a parenthesis is not closed")


def _named(query: list[Token], forbidden: Forbidden, allowed: frozenset[str]) -> None:
    for place, token in enumerate(query):
        if token.kind not in ("name", "quoted") or token.text in allowed:
            continue
        following = query[place + 1] if place + 1 < len(query) else None
        before = query[place - 1] if place else None
        called = following is not None and following.kind == "mark" and following.text == "("
        if called and (token.text in forbidden.functions or token.text.startswith("xml")):
            raise Refused(f"not allowed: function {token.text}")
        if before is not None and before[:2] == ("mark", ".") and token.text in forbidden.attributes:
            raise Refused(f"not allowed: function {token.text}")
        if token.text in forbidden.tables:
            raise Refused(f"not allowed: reading {token.text}")


@lru_cache(maxsize=512)
def line_of(sql: str, position: int) -> str:
    """Where a character is, in words: `line 2, at "colour FROM"`.

    Args:
        sql: the text.
        position: of the character, from 0.
    """
    line = sql.count("\n", 0, position) + 1
    near = " ".join(sql[position : position + 30].split("\n")[0].split())
    return f'line {line}, at "{near}"' if near else f"line {line}, at the end"
