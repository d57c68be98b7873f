"""The bars of the sandbox, measured: `python benchmarks/sandbox.py`.

    python benchmarks/sandbox.py                   # all of it, as root and as an unprivileged user where this is root
    python benchmarks/sandbox.py --programs 100    # fewer hostile programs
    python benchmarks/sandbox.py --parts speed     # one part
    python benchmarks/sandbox.py --user nobody     # as one user only

Hostile programs (a catalogue of attacks, each in many forms) may reach nothing, leave no process and change nothing of
the host; programs that try to pass tests without being right may earn nothing; reference solutions of HumanEval and of
MBPP must all pass; and the sandbox must run enough of them a second. Exit status 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pwd
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sandbox_catalogue import Hostile, attacks, hostile_programs, kinds_of
from sandbox_exploits import exploit_answers, honest_answers
from sandbox_host import REPOSITORY, Host, host

from posttrain.core import Grade, Grader, Trajectory
from posttrain.grade import Sandbox, SandboxLimits, SandboxUnavailable, UnitTests, grade_all

PARTS = ("hostile", "exploits", "honest", "speed")
UNPRIVILEGED = "nobody"
LIMITS = SandboxLimits(
    cpu_s=1, wall_s=2.0, memory_bytes=400_000_000, disk_bytes=32_000_000, output_bytes=100_000, tasks=16
)
GRACE_S = 20.0  # beyond its time for a run to be over, on a busy machine
PER_SECOND = 40.0
_DATA = REPOSITORY.parent / "shared" / "data"


@dataclass(frozen=True)
class Bar:
    """One measured figure, and whether it is what it must be."""

    name: str
    figure: str
    met: bool
    notes: tuple[str, ...] = ()


def run_hostile(programs: Sequence[Hostile], beside: Host, *, workers: int = 2) -> list[Bar]:
    """Run them, a few at a time, and look at the host after every few."""
    plain, spawning = Sandbox(LIMITS), Sandbox(LIMITS.replace(spawn=True), readable=[Path("/usr/bin")])
    escapes: list[str] = []
    survivors: list[str] = []
    slow: list[str] = []
    endings = {"ended": 0, "timed out": 0, "too much output": 0}
    memory_bytes = 0

    def one(hostile: Hostile) -> None:
        nonlocal memory_bytes
        started_s = time.monotonic()
        run = (spawning if hostile.spawn else plain).run_now(hostile.program)
        name = f"{hostile.kind}/{hostile.name} ({hostile.delivery})"
        said = run.stdout + run.stderr
        if "REACHED" in run.stdout or beside.secret in said:
            escapes.append(f"{name}: {run.stdout.strip()[-200:]!r}")
        if time.monotonic() - started_s > LIMITS.wall_s + GRACE_S:
            slow.append(f"{name}: {time.monotonic() - started_s:.1f} s")
        memory_bytes = max(memory_bytes, run.memory_bytes)
        endings["timed out" if run.timed_out else "too much output" if run.too_much_output else "ended"] += 1

    try:
        plain.start()
        spawning.start()
        makers = {pid for sandbox in (plain, spawning) if (pid := sandbox.maker_pid) is not None}
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(programs), 50):
                list(pool.map(one, programs[start : start + 50]))
                survivors += [f"after {start + 50} programs: {line}" for line in beside.survivors(makers)]
    finally:
        plain.close()
        spawning.close()
    survivors += [f"at the end: {line}" for line in beside.survivors(set())]
    changes = beside.changes()
    kinds = ", ".join(f"{count} {kind}" for kind, count in kinds_of(programs).items())
    distinct = len({(hostile.kind, hostile.name) for hostile in programs})
    ends = ", ".join(f"{count} {how}" for how, count in endings.items())
    note = f"{len(programs)} programs of {distinct} attacks: {kinds}; {ends}; largest {memory_bytes / 1e6:.0f} MB"
    return [
        Bar("escapes", f"{len(escapes)} of {len(programs)}", not escapes, (note, *escapes)),
        Bar("surviving processes", str(len(survivors)), not survivors, tuple(survivors)),
        Bar("changes of the host", str(len(changes)), not changes, tuple(changes)),
        Bar("runs past their time", str(len(slow)), not slow, tuple(slow)),
    ]


def graded(grader: Grader, answers: Sequence[Trajectory], concurrency: int = 4) -> list[Grade]:
    """Their grades."""
    return asyncio.run(grade_all(grader, answers, deadline_s=120.0, concurrency=concurrency))


def run_exploits() -> list[Bar]:
    """Every exploit as an answer to tasks of its grader; a score above 0 is a wrong reward."""
    with_sandbox = Sandbox(LIMITS)
    wrong, failed, total, names = [], [], 0, set()
    for grader, answers in exploit_answers(with_sandbox, _DATA):
        grades = graded(grader, [answer for _, answer in answers])
        for (name, answer), grade in zip(answers, grades, strict=True):
            total += 1
            names.add(name)
            if grade.error is not None:
                failed.append(f"{name} on {answer.task.id}: {grade.error}")
            elif grade.score:
                wrong.append(f"{name} on {answer.task.id}: {grade.score} by {grade.grader}")
    with_sandbox.close()
    note = f"{len(names)} exploits, {total} answers"
    return [
        Bar("wrong rewards", f"{len(wrong)} of {total}", not wrong and len(names) >= 50, (note, *wrong)),
        Bar("exploits that break the grader", str(len(failed)), not failed, tuple(failed)),
    ]


def run_honest(number: int) -> list[Bar]:
    """Reference solutions through the grader; each must score 1."""
    answers = honest_answers(_DATA, number)
    if not answers:
        return [Bar("false negatives", "not measured", True, (f"no code data in {_DATA}",))]
    sandbox = Sandbox()
    grades = graded(UnitTests(sandbox), answers)
    sandbox.close()
    pairs = zip(answers, grades, strict=True)
    missed = [f"{answer.task.id}: {grade.error or grade.rationale}" for answer, grade in pairs if grade.score != 1.0]
    return [Bar("false negatives", f"{len(missed)} of {len(answers)}", not missed, tuple(missed))]


def run_speed(seconds: float = 4.0, repeats: int = 5) -> list[Bar]:
    """Executions a second on two cores: a program alone, and a program with its tests in a sandbox of their own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:2])
    sandbox = Sandbox()
    program, test = "def add(a, b):\n    return a + b\nprint(add(2, 3))", "assert add(2, 3) == 5"
    work = {
        "executions a second": lambda: sandbox.run_now(program).stdout == "5\n",
        "graded programs a second": lambda: sandbox.judge_now(program, [test]).passed,
    }
    bars = []
    try:
        sandbox.start()
        for name, once in work.items():
            rates = [_rate(once, seconds / repeats * 2) for _ in range(repeats)]
            middle = sorted(rates)[len(rates) // 2]
            note = f"on {min(2, len(cores))} cores, median of {repeats}: {', '.join(f'{rate:.0f}' for rate in rates)}"
            busy = f"load before this of the machine's {os.cpu_count()} cores: {os.getloadavg()[0]:.1f}"
            bars.append(Bar(name, f"{middle:.0f}", middle >= PER_SECOND, (note, busy)))
    finally:
        os.sched_setaffinity(0, cores)
        sandbox.close()
    return bars


def _rate(once: Any, seconds: float) -> float:
    started_s = time.monotonic()

    def until() -> int:
        done = 0
        while time.monotonic() - started_s < seconds:
            assert once(), "a program that must run did not"
            done += 1
        return done

    with ThreadPoolExecutor(4) as pool:
        done = sum(pool.map(lambda _: until(), range(4)))
    return done / (time.monotonic() - started_s)


def measure(parts: Sequence[str], programs: int, solutions: int) -> list[Bar]:
    """The chosen parts as this user; where no sandbox is to be had, that and nothing else."""
    probe = Sandbox()
    try:
        probe.start()
    except SandboxUnavailable as error:
        return [Bar("sandbox", "refused, nothing was run", False, (str(error),))]
    finally:
        probe.close()
    bars = []
    if "hostile" in parts:
        with host() as beside:
            bars += run_hostile(hostile_programs(programs, beside.targets), beside)
    if "exploits" in parts:
        bars += run_exploits()
    if "honest" in parts:
        bars += run_honest(solutions)
    if "speed" in parts:
        bars += run_speed()
    return bars


def measure_as(user: str, arguments: Sequence[str]) -> list[Bar]:
    """The same by another process of another user, with an interpreter that this user may run."""
    account = pwd.getpwnam(user)
    own = [sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}", "/usr/bin/python3"]
    identity: dict[str, Any] = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    packages = [str(REPOSITORY / "src"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(packages), "HOME": "/", "LANG": "C.UTF-8"}
    wanted = f"import sys, msgspec, posttrain.grade; assert sys.version_info[:2] == {sys.version_info[:2]}"
    for python in own:
        try:
            usable = subprocess.run([python, "-c", wanted], env=environment, cwd="/", capture_output=True, **identity)
        except OSError:
            continue
        if usable.returncode == 0:
            break
    else:
        return [Bar("sandbox", "not measured", False, (f"{user} may run none of {', '.join(own)}",))]
    words = [python, str(Path(__file__).resolve()), *arguments, "--user", "", "--json"]
    done = subprocess.run(words, env=environment, cwd="/", capture_output=True, text=True, **identity)
    try:
        return [Bar(**{**bar, "notes": tuple(bar["notes"])}) for bar in json.loads(done.stdout)]
    except json.JSONDecodeError:
        return [Bar("sandbox", "broken off", False, (done.stderr[-500:],))]


def main() -> int:
    """Measure, print, and say by the exit status whether every bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--programs", type=int, default=1000, help=f"hostile programs, of {len(attacks())} attacks")
    parser.add_argument("--solutions", type=int, default=200, help="reference solutions")
    parser.add_argument("--user", help=f"measure as this user only; otherwise root is followed by {UNPRIVILEGED}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    given = ["--parts", *chosen.parts, "--programs", str(chosen.programs), "--solutions", str(chosen.solutions)]
    me = pwd.getpwuid(os.geteuid()).pw_name
    found: dict[str, list[Bar]] = {}
    if chosen.user in (None, "", me):
        found[me] = measure(chosen.parts, chosen.programs, chosen.solutions)
    if chosen.user is None and os.geteuid() == 0:
        found[UNPRIVILEGED] = measure_as(UNPRIVILEGED, given)
    elif chosen.user not in (None, "", me):
        found[chosen.user] = measure_as(chosen.user, given)
    if chosen.json:
        print(json.dumps([asdict(bar) for bars in found.values() for bar in bars]))
    else:
        _print(found)
    return int(not all(bar.met for bars in found.values() for bar in bars))


def _print(found: dict[str, list[Bar]]) -> None:
    for user, bars in found.items():
        print(f"\nas {user}")
        for bar in bars:
            print(f"  {'ok    ' if bar.met else 'MISSED'} {bar.name}: {bar.figure}")
            for note in bar.notes[:30]:
                print(f"           {note}")
    if os.geteuid() != 0:
        print("\nroot was not measured: run it as root for that")


if __name__ == "__main__":
    sys.exit(main())
