"""Is one model better than another? Both answer the same tasks, and a paired test says how sure that is.

    posttrain run examples/compare_models.py --candidate FOLDER --champion FOLDER --data tasks.jsonl --grader number

The same comparison decides `posttrain promote`. Everything here is the public interface; change what you need.
"""

import asyncio
from pathlib import Path

import posttrain as pt
from posttrain.core import Comparison, EvalReport
from posttrain.recipes.grading import grader_from
from posttrain.recipes.policy import load_policy


def evaluated(folder: str, suite: pt.evaluate.Suite, slots: int) -> EvalReport:
    """One model's answers to every task, graded."""
    policy = load_policy(folder)
    # Each model stops where its own chat template ends a turn; the rest of the sampling is the suite's.
    stops = tuple(sorted(policy.renderer.stop_tokens))
    own = pt.evaluate.Suite(suite.name, suite.tasks, suite.sampling.replace(stop_tokens=stops), suite.grader)
    with policy.engine(slots=slots) as engine:
        report = asyncio.run(pt.evaluate.run_suite(own, engine, policy.renderer.prompt, model=folder))
    return report.replace(sampling=suite.sampling)


@pt.recipe
def compare_models(
    *,
    candidate: str,
    champion: str,
    data: Path,
    grader: str = "exact",
    columns: str | None = None,
    chat: bool = False,
    limit: int | None = None,
    max_tokens: int = 64,
    slots: int = 64,
) -> Comparison:
    """Compare two models on one file of tasks, by a paired test.

    Args:
        candidate: folder of the model that may be better.
        champion: folder of the model that it is compared with.
        data: tasks: prompts with reference answers.
        grader: exact, number, maths, sql:DATABASE[,DATABASE], or FILE.py:NAME.
        columns: which columns to read, as `prompt=question,answer=solution`.
        chat: make text prompts a user's turn of the chat template.
        limit: the first so many tasks.
        max_tokens: new tokens per answer.
        slots: answers sampled at the same time.
    """
    rows = pt.data.load(data, kind="prompt", columns=columns, limit=limit)
    tasks = [pt.data.to_task(row, chat=chat) for row in rows]
    greedy = pt.Sampling(max_tokens=max_tokens, temperature=0.0)
    suite = pt.evaluate.Suite(data.stem, tasks, greedy, grader_from(grader))
    reports = {folder: evaluated(folder, suite, slots) for folder in (candidate, champion)}
    for folder, report in reports.items():
        score = report.metrics["accuracy"]
        print(f"{folder}: accuracy {score.value:.1%} [{score.low:.1%}, {score.high:.1%}] on {score.n} tasks")
    found = pt.evaluate.compare(reports[candidate], reports[champion])
    gap = found.difference
    print(
        f"difference {gap.value:+.1%} [{gap.low:+.1%}, {gap.high:+.1%}] with {gap.confidence:.0%} confidence; "
        f"{found.wins} tasks only the candidate gets right, {found.losses} only the champion; p = {found.p_value:.3g}"
    )
    print("the candidate is better" if found.better else "that the candidate is better is not shown")
    return found
