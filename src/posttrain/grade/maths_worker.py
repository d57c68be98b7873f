"""The process in which math-verify runs. It reads one job a line from standard input and answers each with one line.

A process of its own because math-verify times itself with `signal.alarm`, which works in a main thread only, and
because algebra may hang or crash: the parent kills this process and starts another.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from typing import Any

_DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")
_MEMORY_BYTES = 4_000_000_000  # of address space
_STEP_S = 5  # each step of math-verify (parsing, one comparison)
# A worker whose parent died while it hung ends itself after this much CPU time on one job.
_CPU_S = 120.0


def judge(gold: str, answer: str) -> dict[str, Any]:
    """Whether an answer is equal to a gold answer.

    Returns:
        `{"correct": bool, "found": what the answer says}` or `{"error": why it could not be judged}`.
    """
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    try:
        gold_parsed = parse(_delimited(gold), parsing_timeout=_STEP_S, raise_on_error=True)
        if not gold_parsed:
            return {"error": f"the gold answer {gold[:200]!r} is no mathematics that can be read"}
        answer_parsed = parse(answer, parsing_timeout=_STEP_S, raise_on_error=True)
        if not answer_parsed:
            return {"correct": False, "found": ""}
        correct = verify(gold_parsed, answer_parsed, timeout_seconds=_STEP_S, raise_on_error=True)
    except TimeoutException:
        return {"error": f"a step took more than {_STEP_S} s"}
    except Exception as error:  # noqa: BLE001  algebra fails in many ways; each is an error of this grade
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"correct": bool(correct), "found": str(answer_parsed[-1])[:200]}


def _delimited(gold: str) -> str:
    """Gold answers are bare LaTeX in most data sets; math-verify looks for it between delimiters."""
    return gold if _DELIMITER.search(gold) else f"\\boxed{{{gold}}}"


def main() -> None:
    """Serve jobs until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    judge("1", "$1$")  # imports and caches: the first job is as quick as the others
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        job = json.loads(line)
        signal.setitimer(signal.ITIMER_VIRTUAL, _CPU_S)
        verdict = judge(job["gold"], job["answer"])
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        answers.write(json.dumps({"id": job["id"], **verdict}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
