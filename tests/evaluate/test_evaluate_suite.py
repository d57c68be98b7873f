"""Running a suite: what is asked, how it is counted, and what happens when things fail."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from conftest_sums import SumGrader, SumSampler, pair_tokens, sum_tasks

from posttrain import evaluate, grade
from posttrain.core import Completion, EvalReport, EvaluateError, SampleRequest, Sampling, StopReason, Task

GREEDY = Sampling(max_tokens=8, temperature=0.0)
FOUR = Sampling(max_tokens=8, temperature=1.0, n=4)


def _run(suite: evaluate.Suite, sampler: SumSampler, **options: object) -> EvalReport:
    return evaluate.run_suite_sync(suite, sampler, pair_tokens, model="m", **options)


def test_a_greedy_suite_has_wilson_intervals() -> None:
    sampler = SumSampler(wrong=lambda request, index: request.prompt[0] < 8)
    report = _run(evaluate.Suite("sums", sum_tasks(40), GREEDY, SumGrader()), sampler)
    assert report.metrics["accuracy"] == evaluate.wilson(32, 40)
    assert report.metrics["accuracy/even"] == evaluate.wilson(16, 20)
    assert report.metrics["accuracy/odd"] == evaluate.wilson(16, 20)
    assert report.metrics["completions/clipped_ratio"].value == 0.0
    assert report.metrics["completions/mean_length"].value == pytest.approx((9 * 1 + 31 * 2) / 40)
    assert "score" not in report.metrics
    assert "pass@1" not in report.metrics
    assert (report.num_failed, report.num_tokens, len(report.samples)) == (0, 71, 40)
    assert EvalReport.from_json(report.to_json()) == report


def test_several_samples_are_clustered_by_task_and_give_pass_at_k() -> None:
    # of 30 tasks: 10 always right, 10 right in one of four, 10 never
    sampler = SumSampler(
        wrong=lambda request, index: request.prompt[0] >= 20 or (request.prompt[0] >= 10 and index > 0)
    )
    report = _run(evaluate.Suite("sums", sum_tasks(30), FOUR, SumGrader()), sampler)
    metrics = report.metrics
    assert metrics["accuracy"].value == pytest.approx((10 + 10 / 4) / 30)
    assert metrics["mean@4"] == metrics["accuracy"]
    assert (metrics["accuracy"].method, metrics["accuracy"].n) == ("clustered", 30)
    assert metrics["pass@1"].value == pytest.approx(metrics["accuracy"].value)
    assert metrics["pass@2"].value == pytest.approx((10 + 10 * 0.5) / 30)
    assert metrics["pass@4"] == evaluate.wilson(20, 30)
    values = [float(s.grade.score or 0) for s in report.samples]
    expected = evaluate.clustered(values, [s.task.id for s in report.samples])
    assert metrics["accuracy"].low == pytest.approx(expected.low)


def test_all_right_is_not_called_certain() -> None:
    report = _run(evaluate.Suite("sums", sum_tasks(10), FOUR, SumGrader()), SumSampler())
    assert report.metrics["accuracy"].value == 1.0
    assert report.metrics["accuracy"].low == pytest.approx(evaluate.wilson(10, 10).low)


def test_tasks_of_one_passage_are_clustered() -> None:
    tasks = [task.replace(cluster=f"c{i // 4}") for i, task in enumerate(sum_tasks(40))]
    sampler = SumSampler(wrong=lambda request, index: request.prompt[0] % 8 < 4)
    report = _run(evaluate.Suite("sums", tasks, GREEDY, SumGrader()), sampler)
    wide, narrow = report.metrics["accuracy"], evaluate.wilson(20, 40)
    assert wide.n == 10
    assert wide.high - wide.low > 1.8 * (narrow.high - narrow.low)


def test_failures_are_wrong_and_told_apart() -> None:
    tasks = [*sum_tasks(8), Task(id="x", prompt="13+13", answer="26"), Task(id="y", prompt="14+14", answer="28")]
    report = _run(evaluate.Suite("sums", tasks, GREEDY, SumGrader()), SumSampler())
    assert report.metrics["accuracy"].value == 0.8
    assert report.num_failed == 2
    errors = {sample.task.id: sample.grade.error or "" for sample in report.samples}
    assert "cannot read boom" in errors["x"]
    assert "out of memory" in errors["y"]


def test_nothing_graded_is_an_error_with_the_cause() -> None:
    tasks = [Task(id="x", prompt="13+13")]
    with pytest.raises(EvaluateError, match="cannot read boom"):
        _run(evaluate.Suite("sums", tasks, GREEDY, SumGrader()), SumSampler())


def test_answers_and_seeds_do_not_depend_on_the_batch() -> None:
    suite = evaluate.Suite("sums", sum_tasks(10), FOUR, SumGrader())
    whole, parts, other = SumSampler(), SumSampler(), SumSampler()
    seen: list[tuple[int, int]] = []
    one = _run(suite, whole)
    two = _run(suite, parts, batch=4, on_progress=lambda done, total: seen.append((done, total)))
    _run(suite, other, seed=1)
    assert (whole.calls, parts.calls) == ([10], [4, 4, 2])
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert whole.seeds == parts.seeds
    assert len(set(whole.seeds.values())) == 10
    assert whole.seeds != other.seeds
    assert one.metrics == two.metrics
    answers = [[(s.task.id, s.index, s.text, s.grade.score) for s in report.samples] for report in (one, two)]
    assert answers[0] == answers[1]


def test_an_interrupted_evaluation_asks_only_what_is_not_answered(tmp_path: Path) -> None:
    suite = evaluate.Suite("sums", sum_tasks(10), FOUR, SumGrader())
    partial = tmp_path / "answers.jsonl"
    whole = _run(suite, SumSampler(), partial=partial)
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join(lines[:18]) + lines[18][:30])  # four tasks, half of a fifth, a torn line
    rest = SumSampler()
    again = _run(suite, rest, partial=partial)
    assert rest.calls == [6]
    assert again.metrics == whole.metrics
    assert [sample.text for sample in again.samples] == [sample.text for sample in whole.samples]
    nobody = SumSampler()
    assert _run(suite, nobody, partial=partial).metrics == whole.metrics
    assert nobody.calls == []
    with pytest.raises(EvaluateError, match="which suite 'others' does not have"):
        _run(evaluate.Suite("others", sum_tasks(3), FOUR, SumGrader()), SumSampler(), partial=partial)


async def _inside_a_loop(suite: evaluate.Suite) -> EvalReport:
    return _run(suite, SumSampler())


def test_the_plain_call_works_inside_a_running_loop() -> None:
    import asyncio

    report = asyncio.run(_inside_a_loop(evaluate.Suite("sums", sum_tasks(3), GREEDY, SumGrader())))
    assert report.metrics["accuracy"].value == 1.0


def test_the_hash_is_of_tasks_and_grader() -> None:
    suite = evaluate.Suite("sums", sum_tasks(3), GREEDY, SumGrader())
    assert suite.suite_hash == evaluate.Suite("other name", sum_tasks(3), FOUR, SumGrader()).suite_hash
    changed = [task.replace(answer="0") for task in sum_tasks(3)]
    assert suite.suite_hash != evaluate.Suite("sums", changed, GREEDY, SumGrader()).suite_hash
    grader = SumGrader()
    grader.name = "other"
    assert suite.suite_hash != evaluate.Suite("sums", sum_tasks(3), GREEDY, grader).suite_hash


@pytest.mark.parametrize(
    ("tasks", "sampling", "k", "match"),
    [
        ([], GREEDY, (), "no tasks"),
        ([*sum_tasks(2), *sum_tasks(1)], GREEDY, (), "'s0' occurs more than once"),
        (sum_tasks(2), GREEDY, (2,), "needs sampling.n"),
        (sum_tasks(2), GREEDY.replace(n=3), (), "3 copies"),
    ],
)
def test_a_suite_that_cannot_be_is_refused(
    tasks: list[Task], sampling: Sampling, k: tuple[int, ...], match: str
) -> None:
    with pytest.raises(EvaluateError, match=match):
        evaluate.Suite("sums", tasks, sampling, SumGrader(), k=k)


def test_which_k() -> None:
    suite = evaluate.Suite("sums", sum_tasks(2), FOUR.replace(n=6), SumGrader())
    assert suite.ks() == (1, 2, 4, 6)
    assert evaluate.Suite("sums", sum_tasks(2), FOUR, SumGrader(), k=(3,)).ks() == (3,)


def test_a_suite_from_tasks_and_from_rows(tmp_path: Path) -> None:
    (tmp_path / "held_out.jsonl").write_bytes(b"".join(task.to_json() + b"\n" for task in sum_tasks(20)))
    suite = evaluate.suite_from_file(tmp_path / "held_out.jsonl", grader=SumGrader(), limit=5, seed=3)
    assert suite.name == "held_out"
    assert len(suite.tasks) == 5
    again = evaluate.suite_from_file(tmp_path / "held_out.jsonl", grader=SumGrader(), limit=5, seed=3)
    assert again.suite_hash == suite.suite_hash
    assert evaluate.suite_from_file(tmp_path / "held_out.jsonl", grader=SumGrader(), limit=5).tasks != suite.tasks
    rows = [{"prompt": f"{i}+2", "answer": f"so it is\n#### {i + 2}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from_rows = evaluate.suite_from_file(tmp_path / "rows.jsonl", grader=SumGrader(), sampling=GREEDY)
    assert [task.answer for task in from_rows.tasks] == ["2", "3", "4", "5"]
    assert _run(from_rows, SumSampler()).metrics["accuracy"].value == 1.0


class Solutions:
    """Answers task number i with the i-th text; a task's prompt is its number."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    async def sample(self, requests: list[SampleRequest]) -> list[list[Completion]]:
        return [[self._one(self.texts[request.prompt[0]])] for request in requests]

    def _one(self, text: str) -> Completion:
        return Completion(tokens=(1,), logprobs=(0.0,), policy_logprobs=(0.0,), text=text, stop_reason=StopReason.EOS)


def test_published_samples_of_gsm8k_score_as_their_labels_say() -> None:
    """1,055 questions with a real model's answers and their published verdicts: the whole path from file to report."""
    folder = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "math"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not here")
    with gzip.open(folder / "gsm8k_example_model_solutions.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tasks = [
        Task(id=str(i), prompt=row["question"], answer=row["ground_truth"].rpartition("A:")[2].strip())
        for i, row in enumerate(rows)
    ]
    published = [row["175b_verification"] for row in rows]
    suite = evaluate.Suite("gsm8k", tasks, GREEDY, grade.Number())
    report = evaluate.run_suite_sync(
        suite, Solutions([entry["solution"] for entry in published]), lambda task: (int(task.id),), model="175b"
    )
    right = sum(entry["is_correct"] for entry in published)
    agree = sum(evaluate.is_right(s) == entry["is_correct"] for s, entry in zip(report.samples, published, strict=True))
    assert len(rows) == 1055
    assert agree / len(rows) > 0.99
    accuracy = report.metrics["accuracy"]
    assert accuracy.low < right / len(rows) < accuracy.high
    assert accuracy.high - accuracy.low == pytest.approx(0.06, abs=0.01)
    weaker = [entry["solution"] for entry in (row["6b_finetuning"] for row in rows)]
    other = evaluate.run_suite_sync(suite, Solutions(weaker), lambda task: (int(task.id),), model="6b")
    assert evaluate.compare(report, other).better
    assert not evaluate.compare(other, report).better
