"""The harness that compares with peers: its arithmetic, its protocol, its search."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest
from versus.catalogue import Workload, catalogue, chosen, tiny_catalogue
from versus.lengths import mixed_lengths, prompt_lengths
from versus.protocol import Worker, WorkerFailed
from versus.results import Result, StartUp, markdown
from versus.search import find_best

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FAKE = """
import sys
sys.path.insert(0, {path!r})
from versus.protocol import serve

class Fake:
    setting, tried = {{"dtype": "fp32"}}, [{{"dtype": "bf16", "error": "no"}}]
    def __init__(self, inputs): self.inputs = inputs
    def run(self):
        print("noise that must not reach the parent's pipe")
        return {{"seconds": 0.5, "work": self.inputs["work"]}}

def prepare(workload, inputs):
    if workload["name"] == "bad": raise ValueError("cannot do it")
    if workload["name"] == "dead": sys.exit(3)
    return Fake(inputs)

serve(prepare, lambda: {{"fp32": 1.0}})
"""


def _result(measure: str = "speed", bar: float | None = 2.0) -> Result:
    workload = Workload(name="x", kind="sft", shape="3m", unit="tokens", measure=measure, bar=bar, aim=3.0)  # type: ignore[arg-type]
    ours = [{"seconds": s, "cpu_s": 2 * s, "work": 100.0, "peak_rss": 1e9} for s in (1.0, 2.0, 1.0)]
    theirs = [{"seconds": s, "cpu_s": s, "work": 100.0, "peak_rss": 4e9} for s in (3.0, 5.0, 2.0)]
    return Result(
        workload=workload,
        ours=ours,
        theirs=theirs,
        peak={"bf16": 1000.0},
        flops=500.0,
        settings={"ours": {}, "theirs": {"dtype": "bf16"}},
    )


def test_ratios_are_of_pairs_and_the_median_decides() -> None:
    result = _result()
    assert result.ratios == [3.0, 2.5, 2.0]
    assert result.cpu_ratios == [1.5, 1.25, 1.0]
    assert result.value == 2.5
    assert result.workload.holds(2.5)
    assert not result.workload.holds(1.9)
    assert result.share(result.ours) == pytest.approx(500.0 / 1.0 / 1000.0)
    assert result.share(result.theirs) == pytest.approx(500.0 / 3.0 / 1000.0)


def test_memory_is_ours_over_theirs_and_less_is_better() -> None:
    result = _result("memory", 0.5)
    assert result.value == 0.25
    assert result.workload.holds(0.25)
    assert not result.workload.holds(0.6)


def test_share_speaks_of_ours() -> None:
    result = _result("share", 0.6)
    assert result.value == pytest.approx(0.5)
    assert result.workload.holds(0.5) is False


def test_the_table_says_what_holds_and_what_was_not_measured() -> None:
    start = StartUp(name="import posttrain", seconds=[0.6, 0.7, 0.5], bar=0.5, aim=0.2)
    text = markdown([_result()], [start], {"y": "theirs: no"}, {"date": "2026-01-01", "threads": 2})
    assert "| x | 100 tokens/s | 33.3 tokens/s | 2.50 (2.00–3.00) | 1.25 | 50.0% | 16.7% | ≥ 2 | ≥ 3 | yes |" in text
    assert "0.60 s (0.50–0.70)" in text
    assert "**no**" in text
    assert "- y: theirs: no" in text
    assert "- threads: 2" in text


def test_lengths_are_log_normal_with_a_quarter_as_mean() -> None:
    lengths = mixed_lengths(256, 256, seed=3)
    assert lengths == mixed_lengths(256, 256, seed=3)
    assert lengths != mixed_lengths(256, 256, seed=4)
    assert sum(lengths) / 256 == pytest.approx(64, abs=1.0)
    assert min(lengths) >= 1
    assert max(lengths) == 256
    assert sorted(lengths)[128] < 64  # skewed: the median lies below the mean
    assert sorted(prompt_lengths(5, 10, 30, seed=0)) == [10, 15, 20, 25, 30]


def test_every_workload_has_a_name_of_its_own_and_a_tiny_twin() -> None:
    names = [workload.name for workload in catalogue()]
    assert len(set(names)) == len(names)
    assert [workload.name for workload in tiny_catalogue()] == names
    assert {workload.shape for workload in tiny_catalogue()} == {"tiny"}
    assert [w.name for w in chosen(["mixed", "sft-3m"], catalogue())] == ["mixed-3m", "mixed-25m", "sft-3m"]
    with pytest.raises(ValueError, match="no workload 'nonsense'"):
        chosen(["nonsense"], catalogue())


def test_a_worker_answers_errs_and_ends(tmp_path: Path) -> None:
    script, inputs = tmp_path / "fake.py", tmp_path / "inputs.json"
    script.write_text(FAKE.format(path=str(BENCHMARKS)))
    inputs.write_text('{"work": 7}')
    log = tmp_path / "log"
    worker = Worker(Path(sys.executable), script, threads=1, log=log)
    ask = {"do": "prepare", "inputs": str(inputs)}
    with pytest.raises(WorkerFailed, match="run before prepare"):
        worker.ask({"do": "run"}, timeout_s=60)
    with pytest.raises(WorkerFailed, match="cannot do it"):
        worker.ask({**ask, "workload": {"name": "bad"}}, timeout_s=60)
    ready = worker.ask({**ask, "workload": {"name": "good"}}, timeout_s=60)
    assert ready["setting"] == {"dtype": "fp32"}
    assert ready["tried"] == [{"dtype": "bf16", "error": "no"}]
    ran = worker.ask({"do": "run"}, timeout_s=60)
    assert ran["work"] == 7
    assert ran["peak_rss"] > 1e6
    assert worker.ask({"do": "peak"}, timeout_s=60) == {"fp32": 1.0}
    with pytest.raises(WorkerFailed, match="ended with status 3"):
        worker.ask({**ask, "workload": {"name": "dead"}}, timeout_s=60)
    worker.close()
    assert "noise" in log.read_text()


class _Work:
    """Takes the seconds that it is told to have taken."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.runs, self.closed = seconds, 0, False

    def __call__(self) -> dict[str, float]:
        self.runs += 1
        return {"seconds": self.seconds, "work": 1.0}

    def close(self) -> None:
        self.closed = True


def test_the_search_keeps_the_quickest_and_writes_down_the_rest() -> None:
    made = {name: _Work(seconds) for name, seconds in (("a", 2.0), ("b", 1.0), ("slow", 9.0), ("c", 1.2))}

    def make(setting: dict[str, str]) -> _Work:
        if setting["name"] == "broken":
            raise RuntimeError("not on this machine")
        return made[setting["name"]]

    best = find_best([{"name": name} for name in ("a", "broken", "b", "slow", "c")], make)  # type: ignore[arg-type]
    assert best.setting == {"name": "b"}
    assert best.run()["seconds"] == 1.0
    assert [entry.get("seconds") for entry in best.tried] == [2.0, None, 1.0, 9.0, 1.2]
    assert "not on this machine" in best.tried[1]["error"]
    assert made["slow"].runs == 1  # far behind after its first run: not run again
    assert made["c"].runs == 2
    assert [name for name, work in made.items() if work.closed] == ["a", "slow", "c"]


def test_without_a_search_the_first_that_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERSUS_SEARCH", "0")
    seconds = itertools.count(5, -1)
    best = find_best([{"n": 0}, {"n": 1}], lambda setting: _Work(float(next(seconds))))
    assert best.setting == {"n": 0}


def test_a_search_without_success_says_why() -> None:
    def make(setting: dict[str, int]) -> _Work:
        raise RuntimeError("never")

    with pytest.raises(RuntimeError, match="never"):
        find_best([{"n": 0}], make)  # type: ignore[arg-type]


def test_threads_are_the_workers_own(tmp_path: Path) -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    script = tmp_path / "threads.py"
    script.write_text(
        f"import sys, os\nsys.path.insert(0, {str(BENCHMARKS)!r})\nfrom versus.protocol import serve\n"
        "serve(None, lambda: {'threads': int(os.environ['OMP_NUM_THREADS'])})\n"
    )
    worker = Worker(Path(sys.executable), script, threads=3, log=tmp_path / "log")
    assert worker.ask({"do": "peak"}, timeout_s=60) == {"threads": 3}
    worker.close()
    assert os.environ.get("OMP_NUM_THREADS") == before
