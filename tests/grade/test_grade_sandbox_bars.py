"""A part of `benchmarks/sandbox.py`: forms of every attack, every exploit, some honest programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.grade import Sandbox, SandboxLimits, SandboxUnavailable, UnitTests

_BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
if _BENCHMARKS not in sys.path:
    sys.path.insert(0, _BENCHMARKS)

import sandbox as bars  # noqa: E402
import sandbox_catalogue  # noqa: E402
import sandbox_exploits  # noqa: E402
import sandbox_host  # noqa: E402

_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
_ENDLESS = ("ignore_all", "catch_limits", "sleeps", "waits", "stops_itself", "closed", "blocked")  # full time each


@pytest.fixture(scope="module", autouse=True)
def _there() -> Iterator[None]:
    probe = Sandbox()
    try:
        probe.start()
    except SandboxUnavailable as error:
        pytest.skip(f"this kernel or container refuses a layer: {error}")
    yield
    probe.close()


def _targets() -> dict[str, str]:
    names = "port udp_port victim host".split()
    texts = "unix unix_dgram abstract canary home_canary repository canary_folder stdlib secret_name hostname".split()
    return {**dict.fromkeys(names, "12345"), **{name: f"/nowhere/{name}" for name in texts}}


def test_the_catalogue_is_large_and_its_programs_differ() -> None:
    attacks = sandbox_catalogue.attacks()
    assert len({(attack.kind, attack.name) for attack in attacks}) == len(attacks) >= 100
    programs = sandbox_catalogue.hostile_programs(1000, _targets())
    assert len({(hostile.program, hostile.spawn) for hostile in programs}) == 1000
    assert {(hostile.kind, hostile.name) for hostile in programs} == {(a.kind, a.name) for a in attacks}
    kinds = sandbox_catalogue.kinds_of(programs)
    assert set(kinds) == {
        "network", "files", "environment", "forks", "memory", "disk", "signals", "proc", "links", "output",
        "background", "kernel",
    }  # fmt: skip
    assert min(kinds.values()) >= 30
    for hostile in programs:
        compile(hostile.program, "hostile.py", "exec")
        assert "@canary@" not in hostile.program


def test_a_program_that_gets_out_is_seen() -> None:
    """The bars can be missed: with layers given up, and a host that is told."""
    with sandbox_host.host() as beside:
        (beside.folder / "canary").write_text("evil")
        assert any("canary" in change for change in beside.changes())
        beside.hits.append("AF_INET from 127.0.0.1")
        assert "reached: AF_INET from 127.0.0.1" in beside.changes()
        open_door = sandbox_catalogue.Hostile("files", "read", "direct", "print('REACHED')", False)
        found = {bar.name: bar for bar in bars.run_hostile([open_door], beside)}
        assert not found["escapes"].met
        assert not found["changes of the host"].met


@pytest.mark.slow
def test_one_form_of_every_attack() -> None:
    with sandbox_host.host() as beside:
        programs = sandbox_catalogue.hostile_programs(len(sandbox_catalogue.attacks()), beside.targets)
        found = bars.run_hostile(programs, beside)
    assert [(bar.name, bar.figure, bar.notes) for bar in found if not bar.met] == []


def test_a_few_of_every_kind() -> None:
    with sandbox_host.host() as beside:
        programs = sandbox_catalogue.hostile_programs(400, beside.targets)
        quick = [hostile for hostile in programs if hostile.name not in _ENDLESS]
        chosen = [
            hostile
            for kind in sandbox_catalogue.kinds_of(quick)
            for hostile in [other for other in quick if other.kind == kind][:40:10]
        ]
        found = bars.run_hostile(chosen, beside)
    assert len(chosen) >= 36
    assert [(bar.name, bar.figure, bar.notes) for bar in found if not bar.met] == []


def test_exploits_earn_nothing() -> None:
    sandbox = Sandbox(SandboxLimits(cpu_s=1, wall_s=2.0, memory_bytes=400_000_000, output_bytes=100_000))
    slow = ("time_out", "endless", "signal_handlers", "answer_then_sleep", "recursion", "endless_generator", "crash")
    names, wrong = set(), []
    for grader, answers in sandbox_exploits.exploit_answers(sandbox, _DATA):
        chosen = [(name, answer) for name, answer in answers if name.partition("/")[2] not in slow]
        chosen = chosen[:: len({answer.task.id for _, answer in chosen}) + 1]  # another task for each
        grades = bars.graded(grader, [answer for _, answer in chosen])
        names |= {name for name, _ in chosen}
        wrong += [
            (name, grade.score, grade.error)
            for (name, _), grade in zip(chosen, grades, strict=True)
            if grade.score != 0
        ]
    sandbox.close()
    assert len(names) >= 50
    assert wrong == []


def test_what_ends_an_iteration_ends_no_test() -> None:
    """`all(map(…))` over a function that raises StopIteration is true; the judge passes none on."""
    sandbox = Sandbox()
    judged = sandbox.judge_now("def f(x): raise StopIteration", ["assert all(map(lambda x: f(x) == x, [1, 2]))"])
    sandbox.close()
    assert judged.results[0] is not None
    assert "StopIteration" in judged.results[0]


def test_honest_programs_pass() -> None:
    answers = sandbox_exploits.honest_answers(_DATA, 200)
    if not answers:
        pytest.skip("no code data beside the repository")
    sandbox = Sandbox()
    grades = bars.graded(UnitTests(sandbox), answers[::10])
    sandbox.close()
    assert [
        (answer.task.id, grade.rationale)
        for answer, grade in zip(answers[::10], grades, strict=True)
        if grade.score != 1
    ] == []


def test_all_processes_of_a_run_share_its_memory() -> None:
    """Sixteen processes of 60 MB each are more than the run may have, though none of them is alone."""
    generous = Sandbox(SandboxLimits(spawn=True, memory_bytes=300_000_000, wall_s=20.0))
    program = """
import os, time
for _ in range({number}):
    if os.fork() == 0:
        x = bytearray(b'x' * 60_000_000); time.sleep({seconds}); os._exit(0)
time.sleep({seconds}); print('done')
"""
    many = generous.run_now(program.format(number=15, seconds=10))
    few = generous.run_now(program.format(number=2, seconds=0.3))
    generous.close()
    assert (many.stdout, many.exit_status, many.timed_out) == ("", -9, False)
    assert many.memory_bytes > 300_000_000
    assert (few.stdout, few.exit_status) == ("done\n", 0)


def test_the_host_has_no_name_inside_and_programs_run_down() -> None:
    sandbox = Sandbox()
    assert sandbox.run_now("import os; print(os.uname().nodename)").stdout == "sandbox\n"
    program = (
        "import atexit, threading, time\natexit.register(print, 'last')\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\nprint('first')"
    )
    assert sandbox.run_now(program).stdout == "first\nthread\nlast\n"
    sandbox.close()
