"""The flywheel, once round at the smallest size, and again killed twice: in GRPO and while it serves.

With so few steps the models know nothing and GRPO finds no reward to learn from; what is asserted is that everything is
there, adds up, and comes out the same. That learning works, and resumes exactly, other journeys show.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import data
from posttrain.core import EvalReport, FeedbackKind, Message
from posttrain.feedback import FeedbackStore
from posttrain.recipes.shop.world import SUITE
from posttrain.registry import Registry, RunFolder

pytestmark = pytest.mark.slow

SIZE = "--pretrain-steps 3 --pairs 16 --sft-epochs 1 --questions 64 --grpo-steps 2 --evaluation 200 --traffic 12"
TRAFFIC = 12
STAGES = ("base", "sft", "grpo", "second")
POSTTRAIN = str(Path(sys.executable).with_name("posttrain"))
LIMIT_S = 420


def start(*words: str | Path) -> subprocess.Popen[str]:
    """`posttrain run …` in a session of its own."""
    return subprocess.Popen(
        [POSTTRAIN, "run", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait; what it said."""
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said[-3000:]
    return said


def kill_when(process: subprocess.Popen[str], come: Callable[[], bool]) -> None:
    """SIGKILL to the process alone, as soon as the moment has come; its helpers must notice and go."""
    give_up = time.monotonic() + LIMIT_S
    while not come():
        assert process.poll() is None, f"it ended before the moment came: {process.communicate()[0][-3000:]}"
        assert time.monotonic() < give_up, "the moment did not come"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while left := _session(process.pid):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


def _session(leader: int) -> list[str]:
    """Command lines of the living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append((stat.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it ended while it was looked at
            continue
    return found


def main_run(runs: Path) -> Path | None:
    """The flywheel's own run folder; those of its stages have longer names."""
    return next((path.parent for path in runs.glob("*-flywheel-????/run.json")), None)


def in_grpo(runs: Path) -> bool:
    """GRPO has taken its first step, and not its last."""
    return any(path.read_bytes().count(b"\n") == 1 for path in runs.glob("*-flywheel-*-grpo/metrics.jsonl"))


def is_serving(runs: Path) -> bool:
    """Some questions have been answered, and not all."""
    for path in runs.glob("*-flywheel-*/feedback.db"):
        try:
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0.2) as database:
                return int(database.execute("SELECT count(*) FROM interactions").fetchone()[0]) >= 2
        except sqlite3.Error:  # not made yet, or busy
            continue
    return False


@pytest.fixture(scope="module")
def flywheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The run folders of one that went through and one that was killed twice, and what the first said."""
    whole, killed = (tmp_path_factory.mktemp(name) / "runs" for name in ("whole", "killed"))
    undisturbed = start("flywheel", *SIZE.split(), "--runs", whole)
    try:
        kill_when(start("flywheel", *SIZE.split(), "--runs", killed), lambda: in_grpo(killed))
        run = main_run(killed)
        assert run is not None
        assert RunFolder.open(run, read_only=True).state.status == "interrupted"
        kill_when(start("--resume", run), lambda: is_serving(killed))
        finish(start("--resume", run))
        said = finish(undisturbed)
    finally:
        undisturbed.kill()
    reference = main_run(whole)
    assert reference is not None
    return reference, run, said


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_finishes_and_every_stage_is_a_run(flywheels: tuple[Path, Path, str]) -> None:
    reference, killed, said = flywheels
    for run in (reference, killed):
        for path in (run, *(run.with_name(f"{run.name}-{stage}") for stage in STAGES)):
            assert RunFolder.open(path, read_only=True).state.status == "finished", path
    assert "held-out execution accuracy" in said
    assert all(re.search(rf"{stage}: execution accuracy \d", said) for stage in STAGES)
    assert RunFolder.open(killed, read_only=True).state.resumed == 2


def test_the_killed_one_ends_with_the_same_models(flywheels: tuple[Path, Path, str]) -> None:
    reference, killed, _ = flywheels
    models = {run: [run.with_name(f"{run.name}-{stage}") / "model" for stage in STAGES] for run in flywheels[:2]}
    for ours, theirs in zip(models[killed], models[reference], strict=True):
        for file in sorted(theirs.iterdir()):
            assert sha256(ours / file.name) == sha256(file), f"{ours.parent.name}/{file.name}"
    digests = {sha256(path / "model.safetensors") for path in models[reference]}
    assert len(digests) >= 3, "base, sft and second are three models"


def test_the_report_loads_nothing_from_elsewhere(flywheels: tuple[Path, Path, str]) -> None:
    for run in flywheels[:2]:
        page = (run / "report.html").read_text(encoding="utf-8")
        assert len(page) > 10_000
        loads = re.findall(r"""(?:src|href|action|data|srcset)\s*=\s*["']?\s*(?:https?:)?//|url\(\s*["']?(?:https?:)?//""", page)  # fmt: skip  # noqa: E501
        assert not loads
        assert not re.search(r"@import|fetch\(|XMLHttpRequest|<link[^>]+stylesheet|<script[^>]+src", page)
        for stage in STAGES:
            assert stage in page


def test_every_question_was_asked_and_logged_once(flywheels: tuple[Path, Path, str]) -> None:
    heard = []
    for run in flywheels[:2]:
        with FeedbackStore(run / "feedback.db") as store:
            served = store.interactions(limit=1000).items
            asked = Counter(item.messages[-1].content for item in served if item.messages)
            assert len(asked) == TRAFFIC
            assert set(asked.values()) == {1}, "a question was asked twice"
            counts = store.counts()
            assert counts.interactions == counts.kinds["thumb"] == TRAFFIC
            assert set(counts.kinds) <= {"thumb", "correction"}
            for item in served:
                kinds = Counter(signal.kind for signal in store.feedback_for(item.id))
                assert kinds["thumb"] == 1
                assert kinds["correction"] <= 1
            heard.append((set(asked), counts.kinds))
    assert heard[0] == heard[1]


def empty_answers(run: Path, kind: FeedbackKind) -> list[bool]:
    """For each signal of a kind, whether it speaks of an answer that says nothing: a model this small may."""
    with FeedbackStore(run / "feedback.db") as store:
        spoken_of = [store.interaction(signal.completion_id) for signal in store.all_feedback(kind)]
    return [item is not None and not item.text.strip() for item in spoken_of]


def loaded(path: Path, kind: Any) -> list[Any]:
    """The rows of a file, none of them bad; a file without rows is no data set and is not loaded."""
    if not path.stat().st_size:
        return []
    found = data.load(path, kind=kind)
    assert found.report.num_bad == 0
    return list(found.rows)


def test_feedback_is_exported_as_data_sets(flywheels: tuple[Path, Path, str]) -> None:
    for run in flywheels[:2]:
        corrected, judged = empty_answers(run, "correction"), empty_answers(run, "thumb")
        pairs = data.load(run / "feedback.jsonl", kind="completion")
        assert len(pairs) >= len(corrected) > 0
        assert pairs.report.num_bad == 0
        better = loaded(run / "feedback_preference.jsonl", "preference")
        assert len(better) == len(corrected) - sum(corrected), "only empty answers cannot be used"
        labelled = loaded(run / "feedback_unpaired_preference.jsonl", "unpaired")
        assert len(labelled) == TRAFFIC - sum(judged)
        first = json.loads((run / "feedback.jsonl").read_text().splitlines()[0])
        assert Message.from_dict(first["prompt"][0]).role == "user"
        assert first["metadata"]["signal"] in ("correction", "vote")


def test_each_candidate_has_a_decision_and_evidence(flywheels: tuple[Path, Path, str]) -> None:
    for run in flywheels[:2]:
        with Registry(run.parent / "registry.db") as registry:
            history = registry.history(run.name)
            decided = {decision.card.id for decision in history}
            models = {}
            for artifact in registry.artifacts("model"):
                (report,) = {report.model: report for report in registry.reports(artifact.id, SUITE)}.values()
                models[sha256(Path(artifact.path) / "model.safetensors")] = artifact, report
            for stage in STAGES[1:]:
                weights = run.with_name(f"{run.name}-{stage}") / "model" / "model.safetensors"
                artifact, report = models[sha256(weights)]
                assert artifact.id in decided, f"no decision about {stage}"
                _check_report(report)
            assert history[0].action == "promoted"
            assert history[0].previous is None
            champion = registry.champion(run.name)
            assert champion is not None
            promoted = [decision.card.id for decision in history if decision.action == "promoted"]
            assert champion.id == promoted[-1]
            for decision in history:
                assert (decision.action == "refused") == bool(decision.refused_for)
            datasets = [node for node in registry.lineage(champion.id).nodes if node.kind == "dataset"]
            assert datasets
            assert all(SUITE in node.meta["contamination"] for node in datasets), "each was checked"


def _check_report(report: EvalReport) -> None:
    score = report.metrics["accuracy"]
    assert score.n == len(report.samples) == 200
    assert score.low <= score.value <= score.high
