"""Promotion: the gate, roll-back, and that no crash or race leaves no champion or two."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.core import Comparison, EvalReport, GateRefused, ModelCard, RegistryError
from posttrain.registry import Gate, Registry

Make = Callable[..., ModelCard]
Compare = Callable[..., Comparison]
GATE = Gate()

# A process that promotes two models in turn, for ever or until statement number `die_at` of the third promotion.
PROMOTE = """
import os, signal, sys
from pathlib import Path
from posttrain.registry import Gate, Registry
registry = Registry(Path(sys.argv[1]))
cards = [registry.card("a"), registry.card("b")]
die_at = int(sys.argv[2])
if die_at:
    count = 0
    def trace(statement):
        global count
        count += 1
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    registry._database._connection.set_trace_callback(trace)
print("ready", flush=True)
turn = 0 if registry.champion("shop").name == "b" else 1
while True:
    registry.promote("shop", cards[turn], gate=Gate(), force=True, reason="crash test")
    if die_at:
        break
    turn = 1 - turn
print("alive", flush=True)
"""


def test_the_first_champion_needs_a_report_and_no_comparison(registry: Registry, make_model: Make) -> None:
    bare = make_model("bare", report=False)
    with pytest.raises(GateRefused, match="no evaluation report"):
        registry.promote("shop", bare, gate=GATE)
    assert registry.champion("shop") is None
    card = make_model("base")
    promotion = registry.promote("shop", card, gate=GATE, actor="ada")
    assert registry.champion("shop") == card
    assert [entry.action for entry in registry.history("shop")] == ["refused", "promoted"]
    assert (promotion.actor, promotion.previous, promotion.seq) == ("ada", None, 2)
    assert registry.projects() == ["shop"]


@pytest.mark.parametrize(
    ("comparison", "gate", "match"),
    [
        ({"low": 0.0}, Gate(), "lower bound must be above"),
        ({"low": 0.04}, Gate(min_difference=0.05), "lower bound must be above"),
        ({"confidence": 0.9}, Gate(), "confidence is 0.900"),
        ({"n": 29}, Gate(), "rests on 29 tasks"),
        ({"p": 0.06}, Gate(), "McNemar"),
        (None, Gate(), "no comparison"),
    ],
)
def test_the_gate_refuses_and_the_champion_stays(
    registry: Registry, make_model: Make, compare: Compare, comparison: dict[str, float] | None, gate: Gate, match: str
) -> None:
    old, new = make_model("old"), make_model("new")
    registry.promote("shop", old, gate=GATE)
    given = None if comparison is None else compare(new.id, old.id, **comparison)
    with pytest.raises(GateRefused, match=match):
        registry.promote("shop", new, comparison=given, gate=gate)
    assert registry.champion("shop") == old
    refusal = registry.history("shop")[-1]
    assert refusal.action == "refused"
    assert match.split()[0] in refusal.refused_for[0]
    assert len(refusal.refused_for) == 1
    assert refusal.gate == gate


def test_few_tasks_and_failed_grades_are_refused(registry: Registry, make_model: Make) -> None:
    with pytest.raises(GateRefused, match="covers 20 tasks"):
        registry.promote("shop", make_model("few", n=20, right=20), gate=GATE)
    with pytest.raises(GateRefused, match="3 of 40 samples could not be graded"):
        registry.promote("shop", make_model("failing", failed=3), gate=GATE)
    assert registry.promote("shop", make_model("two", failed=2), gate=GATE).action == "promoted"


@pytest.mark.parametrize(
    ("meta", "gate", "refused"),
    [
        ({}, Gate(), False),
        ({}, Gate(require_contamination_check=True), True),
        ({"contamination": {"sums": 0.0}}, Gate(require_contamination_check=True), False),
        ({"contamination": {"sums": 0.01}}, Gate(), True),
        ({"contamination": {"sums": 0.01}}, Gate(max_contamination=0.02), False),
        ({"contamination": {"sums": 0.01}}, Gate(require_no_contamination=False), False),
        ({"contamination": {"other": 0.5}}, Gate(require_contamination_check=True), True),
    ],
)
def test_contamination_anywhere_in_the_lineage_counts(
    registry: Registry, make_model: Make, compare: Compare, meta: dict[str, object], gate: Gate, refused: bool
) -> None:
    old = make_model("old")
    registry.promote("shop", old, gate=GATE)
    registry.add_artifact(b"rows", kind="dataset", name="rows", meta=meta)
    make_model("parent", parents=("rows",))
    new = make_model("new", parents=("parent",))
    comparison = compare(new.id, old.id)
    if refused:
        with pytest.raises(GateRefused, match="dataset rows"):
            registry.promote("shop", new, comparison=comparison, gate=gate)
    else:
        assert registry.promote("shop", new, comparison=comparison, gate=gate).previous == old.id


def test_a_comparison_of_other_models_is_an_error(registry: Registry, make_model: Make, compare: Compare) -> None:
    one, two, three = make_model("one"), make_model("two"), make_model("three")
    with pytest.raises(RegistryError, match="no champion yet"):
        registry.promote("shop", one, comparison=compare(one.id, two.id), gate=GATE)
    registry.promote("shop", one, gate=GATE)
    with pytest.raises(RegistryError, match="champion is one"):
        registry.promote("shop", three, comparison=compare(three.id, two.id), gate=GATE)
    with pytest.raises(RegistryError, match="candidate is"):
        registry.promote("shop", three, comparison=compare(two.id, one.id), gate=GATE)
    with pytest.raises(RegistryError, match="not finite"):
        registry.promote("shop", three, comparison=compare(three.id, one.id, low=float("nan")), gate=GATE)
    assert [entry.action for entry in registry.history("shop")] == ["promoted"]
    assert registry.promote("shop", three, comparison=compare("three", one.id[:12]), gate=GATE).previous == one.id


def test_force_needs_a_reason_and_says_what_it_overruled(registry: Registry, make_model: Make) -> None:
    old, new = make_model("old"), make_model("new", report=False)
    registry.promote("shop", old, gate=GATE)
    with pytest.raises(RegistryError, match="needs a reason"):
        registry.promote("shop", new, gate=GATE, force=True)
    promotion = registry.promote("shop", new, gate=GATE, force=True, reason="the old one leaks prices", actor="ada")
    assert promotion.forced
    assert len(promotion.refused_for) == 2
    assert registry.champion("shop") == new


def test_promoting_the_champion_again_changes_nothing(registry: Registry, make_model: Make) -> None:
    card = make_model("one")
    first = registry.promote("shop", card, gate=GATE)
    assert registry.promote("shop", card, gate=GATE) == first
    assert len(registry.history("shop")) == 1


def test_rolling_back_goes_back_one_by_one_or_straight(registry: Registry, make_model: Make) -> None:
    a, b, c = (make_model(name) for name in ("a", "b", "c"))
    for card in (a, b, c):
        registry.promote("shop", card, gate=GATE, force=True, reason="test")
    rolled = registry.rollback("shop", reason="complaints", actor="ada")
    assert (rolled.action, rolled.previous, rolled.card) == ("rolled_back", c.id, b)
    registry.rollback("shop")
    assert registry.champion("shop") == a
    with pytest.raises(RegistryError, match="no champion before"):
        registry.rollback("shop")
    registry.rollback("shop", to="c")
    assert registry.champion("shop") == c
    registry.rollback("shop")
    assert registry.champion("shop") == b
    with pytest.raises(RegistryError, match="champion already"):
        registry.rollback("shop", to=b.id[:8])
    with pytest.raises(RegistryError, match="no former champion"):
        registry.rollback("shop", to="zzz")
    with pytest.raises(RegistryError, match="no project"):
        registry.rollback("shopp")
    assert [entry.action for entry in registry.history("shop")] == ["promoted"] * 3 + ["rolled_back"] * 4


def test_a_champion_whose_weights_are_gone_cannot_come_back(registry: Registry, make_model: Make) -> None:
    a, b = make_model("a"), make_model("b")
    registry.promote("shop", a, gate=GATE)
    registry.promote("shop", b, gate=GATE, force=True, reason="test")
    Path(a.path).rename(Path(a.path).with_name("moved"))
    with pytest.raises(RegistryError, match="weights are gone"):
        registry.rollback("shop")
    assert registry.champion("shop") == b


def test_projects_are_apart(registry: Registry, make_model: Make) -> None:
    a, b = make_model("a"), make_model("b")
    registry.promote("one", a, gate=GATE)
    registry.promote("two", b, gate=GATE)
    assert registry.champion("one") == a
    assert registry.champion("two") == b
    assert registry.champion("three") is None


def test_of_two_that_saw_the_same_champion_one_wins(
    registry: Registry, make_model: Make, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, rival = make_model("old"), make_model("new"), make_model("rival")
    registry.promote("shop", old, gate=GATE)
    reasons = Gate.reasons

    def slow_reasons(self: Gate, **given: object) -> list[str]:
        with Registry(registry.path) as other, pytest.MonkeyPatch.context() as patch:
            patch.setattr(Gate, "reasons", reasons)
            other.promote("shop", rival, comparison=compare(rival.id, old.id), gate=GATE)
        return reasons(self, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(Gate, "reasons", slow_reasons)
    with pytest.raises(RegistryError, match=r"another promotion came first \(the champion is now rival\)"):
        registry.promote("shop", new, comparison=compare(new.id, old.id), gate=GATE)
    assert registry.champion("shop") == rival
    assert [entry.card.name for entry in registry.history("shop")] == ["old", "rival"]


def test_many_threads_and_connections_leave_one_champion(registry: Registry, make_model: Make) -> None:
    cards = [make_model(f"m{i}") for i in range(8)]
    outcomes: list[str] = []
    barrier = threading.Barrier(len(cards))

    def promote(card: ModelCard, own: Registry) -> None:
        barrier.wait()
        try:
            own.promote("shop", card, gate=GATE)
            outcomes.append(card.name)
        except RegistryError as error:
            outcomes.append(type(error).__name__)

    others = [Registry(registry.path) for _ in range(4)]
    threads = [
        threading.Thread(target=promote, args=(card, others[i % 4] if i < 6 else registry))
        for i, card in enumerate(cards)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in others:
        other.close()
    winners = [outcome for outcome in outcomes if outcome.startswith("m")]
    champion = registry.champion("shop")
    assert champion is not None
    assert winners == [champion.name]
    assert [entry.action for entry in registry.history("shop")].count("promoted") == 1


def _spawn(path: Path, die_at: int) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", PROMOTE, str(path), str(die_at)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def _consistent(path: Path) -> tuple[str, int]:
    """Checks one champion, the one that the history says; gives its name and the number of decisions."""
    with Registry(path) as registry:
        registry.check()
        champion = registry.champion("shop")
        history = registry.history("shop")
        assert champion is not None
        assert history[-1].card == champion
        rows = registry._database._rows("SELECT * FROM champions")
        assert len(rows) == 1
        return champion.name, len(history)


def test_killed_at_any_statement_of_a_promotion(registry: Registry, make_model: Make) -> None:
    a, _ = make_model("a"), make_model("b")
    registry.promote("shop", a, gate=GATE)
    seen, ends = {_consistent(registry.path)}, 0
    for die_at in range(1, 60):
        child = _spawn(registry.path, die_at)
        assert child.stdout is not None
        alive = child.stdout.read() == "alive\n"
        child.wait()
        state = _consistent(registry.path)
        if alive:
            ends = die_at
            break
        assert child.returncode == -signal.SIGKILL
        seen.add(state)
    assert ends > 10  # the promotion has that many statements, and each was a place to die
    assert seen == {("a", 1)}  # none of them was after the commit


@pytest.mark.slow
def test_killed_at_random_moments(registry: Registry, make_model: Make) -> None:
    a, _ = make_model("a"), make_model("b")
    registry.promote("shop", a, gate=GATE)
    moments, counts = random.Random(7), []
    for _ in range(25):
        child = _spawn(registry.path, 0)
        time.sleep(moments.uniform(0.0, 0.15))
        child.send_signal(signal.SIGKILL)
        child.wait()
        counts.append(_consistent(registry.path)[1])
    assert counts == sorted(counts)
    assert counts[-1] > 25  # the children did promote


def test_a_report_on_another_suite_does_not_count(
    registry: Registry, make_model: Make, make_report: Callable[..., EvalReport], compare: Compare
) -> None:
    old, new = make_model("old"), make_model("new")
    registry.promote("shop", old, gate=GATE)
    with pytest.raises(GateRefused, match="no evaluation report"):
        registry.promote("shop", new, comparison=compare(new.id, old.id, suite="other"), gate=GATE)
