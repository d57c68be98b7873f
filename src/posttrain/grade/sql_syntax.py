"""What can be said of a SQLite query without running it: its tokens, its order, and how far its CTEs multiply."""

from __future__ import annotations

import re
from functools import lru_cache

_TOKEN = re.compile(
    r"""
    (?P<comment>--[^\n]*|/\*.*?(?:\*/|\Z))
  | (?P<name>[A-Za-z_\u0080-\U0010ffff][\w$\u0080-\U0010ffff]*)
  | (?P<quoted>"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\]|'(?:[^']|'')*')
  | (?P<mark>[();])
    """,
    re.VERBOSE | re.DOTALL,
)
# SQLite copies a common table expression wherever it is named, while compiling, and cannot be interrupted there.
MAX_EXPANSION = 2_000


def tokens(sql: str) -> list[tuple[str, str]]:
    """`(kind, text)` of names, quoted names or texts, parentheses and semicolons; comments and the rest are left out.

    Names and quoted texts are in lower case, without their quotes; kinds are "name", "quoted" and "mark".
    """
    found: list[tuple[str, str]] = []
    for match in _TOKEN.finditer(sql):
        kind, text = match.lastgroup or "", match.group().lower()
        if kind == "quoted":
            text = text[1:-1]
        if kind != "comment":
            found.append((kind, text))
    return found


@lru_cache(maxsize=4096)
def ordered_at_top(sql: str) -> bool:
    """True where the query itself, not a subquery or window of it, has an ORDER BY."""
    depth = 0
    previous = ("", "")
    for token in tokens(sql):
        if token == ("mark", "("):
            depth += 1
        elif token == ("mark", ")"):
            depth -= 1
        elif depth == 0 and previous == ("name", "order") and token == ("name", "by"):
            return True
        previous = token
    return False


def expansion(sql: str) -> int:
    """How many copies of common table expressions a query unfolds into; 0 where it has none.

    A chain of n expressions of which each names the last one twice unfolds into 2ⁿ copies.
    """
    if "with" not in sql.lower():
        return 0
    found = tokens(sql)
    bodies = _definitions(found)
    inside = {place for name, start, end in bodies.values() for place in (name, *range(start, end))}
    weights: dict[str, int] = {}

    def weight(name: str, above: frozenset[str]) -> int:
        if name not in weights:
            _, start, end = bodies[name]
            named = [text for kind, text in found[start:end] if kind != "mark" and text in bodies]
            seen = above | {name}
            weights[name] = min(MAX_EXPANSION + 1, 1 + sum(weight(text, seen) for text in named if text not in seen))
        return weights[name]

    outside = [text for position, (kind, text) in enumerate(found) if position not in inside and kind != "mark"]
    if len(bodies) > 100:
        return MAX_EXPANSION + 1
    return min(MAX_EXPANSION + 1, sum(weight(text, frozenset()) for text in outside if text in bodies))


def _definitions(found: list[tuple[str, str]]) -> dict[str, tuple[int, int, int]]:
    """Of each `name [(columns)] AS [[NOT] MATERIALIZED] (body)`: positions of its name, its body and its end."""
    opened: list[int] = []
    closes: dict[int, int] = {}
    opens: dict[int, int] = {}
    for position, token in enumerate(found):
        if token == ("mark", "("):
            opened.append(position)
        elif token == ("mark", ")") and opened:
            start = opened.pop()
            closes[start], opens[position] = position, start
    bodies: dict[str, tuple[int, int, int]] = {}
    for position, token in enumerate(found):
        if token != ("name", "as") or position == 0:
            continue
        body = position + 1
        while body < len(found) and found[body] in (("name", "not"), ("name", "materialized")):
            body += 1
        if body >= len(found) or found[body] != ("mark", "("):
            continue
        before = opens[position - 1] - 1 if position - 1 in opens else position - 1
        if before >= 0 and found[before][0] != "mark":
            bodies[found[before][1]] = (before, body, closes.get(body, len(found)))
    return bodies
