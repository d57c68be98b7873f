"""From the catalogue of attacks to hostile programs: each attack, with each of its parameters, in many ways."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sandbox_attacks_exhaust import EXHAUST
from sandbox_attacks_files import FILES
from sandbox_attacks_reach import REACH

_HEAD = re.compile(r"^## (\w+)/(\w+)\n((?:#: .*\n)*)", re.MULTILINE)
_END = "except BaseException as error:\n    print('stopped:', type(error).__name__, str(error)[:80])\n"


@dataclass(frozen=True)
class Attack:
    """One attack: its kind and name, its program, and the parameters that vary."""

    kind: str
    name: str
    body: str
    parameters: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def variants(self) -> list[dict[str, str]]:
        """Every combination of parameters, those that differ most first."""
        names = [name for name, _ in self.parameters]
        found = [
            dict(zip(names, values, strict=True)) for values in itertools.product(*(v for _, v in self.parameters))
        ]
        stride = next(n for n in (7, 11, 13, 17, 1) if len(found) % n or n == 1)
        return [found[(place * stride) % len(found)] for place in range(len(found))]


@dataclass(frozen=True)
class Hostile:
    """A program to be run, and whether its sandbox lets it start processes."""

    kind: str
    name: str
    delivery: str
    program: str
    spawn: bool


def attacks() -> list[Attack]:
    """The catalogue."""
    found = []
    for text in (REACH, FILES, EXHAUST):
        heads = list(_HEAD.finditer(text))
        ends = [*(head.start() for head in heads[1:]), len(text)]
        for head, end in zip(heads, ends, strict=True):
            lines = [line[3:].partition("=") for line in head[3].splitlines()]
            parameters = tuple((name, tuple(values.split("|"))) for name, _, values in lines)
            found.append(Attack(head[1], head[2], text[head.end() : end].strip() + "\n", parameters))
    return found


def hostile_programs(number: int, targets: Mapping[str, str]) -> list[Hostile]:
    """So many different programs, every attack as often as every other while it has variants left.

    Args:
        number: how many.
        targets: the host's names, paths and numbers, which take the place of `@name@`.

    Raises:
        ValueError: the catalogue has not so many.
    """
    queues = [_programs(attack, targets) for attack in attacks()]
    chosen: dict[str, Hostile] = {}
    while len(chosen) < number and queues:
        for queue in list(queues):
            made = next(queue, None)
            if made is None:
                queues.remove(queue)
            elif len(chosen) < number:
                chosen.setdefault(f"{made.spawn}{made.program}", made)
    if len(chosen) < number:
        raise ValueError(f"the catalogue has {len(chosen)} programs, not {number}")
    return list(chosen.values())


def _programs(attack: Attack, targets: Mapping[str, str]) -> itertools.chain[Hostile]:
    """All of one attack: with each new delivery the parameters go round, so that few programs differ in both."""
    ways = list(DELIVERIES)
    rounds = [
        _program(attack, values, ways[(place + turn) % len(ways)], targets)
        for turn in range(len(ways))
        for place, values in enumerate(attack.variants)
    ]
    return itertools.chain(rounds)


def _program(attack: Attack, values: Mapping[str, str], delivery: str, targets: Mapping[str, str]) -> Hostile:
    body = attack.body
    for name, value in {**values, **targets, **values}.items():
        body = body.replace(f"@{name}@", value)
    for name, value in targets.items():  # a parameter may name a target
        body = body.replace(f"@{name}@", value)
    may_start = attack.kind in ("forks", "background") or attack.name in ("set_user_id", "in_all_processes", "filter")
    spawn = (may_start and delivery != "thread") or delivery == "child"
    return Hostile(attack.kind, attack.name, delivery, DELIVERIES[delivery](body), spawn)


def _direct(body: str) -> str:
    return f"try:\n{_indented(body)}{_END}"


def _hidden(body: str) -> str:
    code = base64.b85encode(body.encode()).decode()
    return f"import base64\ntry:\n    exec(compile(base64.b85decode({code!r}), 'x', 'exec'), {{}})\n{_END}"


def _thread(body: str) -> str:
    return (
        f"import threading\ndef attack():\n    try:\n        exec({body!r}, {{}})\n{_indented(_END)}"
        "t = threading.Thread(target=attack)\nt.start()\nt.join()\n"
    )


def _module(body: str) -> str:
    return f"open('evil.py', 'w').write({body!r})\nimport sys\nsys.path.insert(0, '.')\ntry:\n    import evil\n{_END}"


def _finaliser(body: str) -> str:
    return (
        f"class Evil:\n    def __del__(self):\n        try:\n            exec({body!r}, {{}})\n"
        f"{_indented(_indented(_END))}evil = Evil()\ndel evil\n"
    )


def _handler(body: str) -> str:
    return (
        f"import os, signal\ndef attack(*_):\n    try:\n        exec({body!r}, {{}})\n{_indented(_END)}"
        "signal.signal(signal.SIGUSR1, attack)\nos.kill(os.getpid(), signal.SIGUSR1)\n"
    )


def _child(body: str) -> str:
    return f"import os\npid = os.fork()\nif pid == 0:\n{_indented(_direct(body))}else:\n    os.waitpid(pid, 0)\n"


def _at_exit(body: str) -> str:
    return f"import atexit\n@atexit.register\ndef attack():\n    try:\n        exec({body!r}, {{}})\n{_indented(_END)}"


DELIVERIES = {
    "direct": _direct,
    "hidden": _hidden,
    "thread": _thread,
    "module": _module,
    "finaliser": _finaliser,
    "handler": _handler,
    "child": _child,
    "at_exit": _at_exit,
}


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def kinds_of(programs: Sequence[Hostile]) -> dict[str, int]:
    """How many programs there are of each kind."""
    found: dict[str, int] = {}
    for hostile in programs:
        found[hostile.kind] = found.get(hostile.kind, 0) + 1
    return found
