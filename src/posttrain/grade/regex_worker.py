"""The process in which patterns are matched that might never end. It answers each job, a line of JSON, with a line.

Python's `re` cannot be interrupted: the parent kills this process and starts another.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from typing import Any

_CPU_S = 120.0  # of one job, after which a worker whose parent died ends itself


def last_match(pattern: re.Pattern[str], group: int | str | None, text: str) -> dict[str, Any]:
    """Whether a pattern is found, and what the group caught in the last match: `{"found": bool, "caught": str}`."""
    found = None
    for match in pattern.finditer(text):
        found = match
        if group is None:
            break
    return {
        "found": found is not None,
        "caught": (found[group] or "") if found is not None and group is not None else "",
    }


def exponent(pattern: str, flags: int) -> int | None:
    """With which power of the text's length the time of a search may grow; None where no power bounds it."""
    from re import _parser  # type: ignore[attr-defined]  # nothing else of the library reads patterns

    count = 0

    def walk(parsed: Any, inside: bool) -> bool:
        nonlocal count
        for operation, argument in parsed:
            name = str(operation)
            if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
                _, most, body = argument
                many = int(most) > 10
                count += many
                if (many and inside) or not walk(body, inside or many):
                    return False
            elif name == "SUBPATTERN":
                if not walk(argument[-1], inside):
                    return False
            elif name == "BRANCH":
                if inside or not all(walk(branch, inside) for branch in argument[1]):
                    return False
            elif name in ("ASSERT", "ASSERT_NOT"):
                if not walk(argument[1], inside):
                    return False
            elif name in ("GROUPREF", "GROUPREF_EXISTS", "ATOMIC_GROUP"):
                return False
        return True

    return count + 1 if walk(_parser.parse(pattern, flags), False) else None


def main() -> None:
    """Serve jobs until standard input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_VIRTUAL, _CPU_S)
        verdict = last_match(re.compile(job["pattern"], job["flags"]), job["group"], job["text"])
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        answers.write(json.dumps({"id": job["id"], **verdict}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
