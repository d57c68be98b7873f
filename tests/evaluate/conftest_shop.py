"""A made-up run of a text-to-SQL project, as a whole: folder, registry, reports, page. Everything is seeded."""

from __future__ import annotations

import math
import random
from pathlib import Path

from posttrain import evaluate
from posttrain.core import EvalReport, EvalSample, GateRefused, Grade, Sampling, StopReason, Task
from posttrain.registry import Gate, Registry, RunFolder

TABLES = ("orders", "customers", "products", "invoices")
HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)>\u202eesrever\x1b[31m'


def shop_tasks(n: int = 300) -> list[Task]:
    rng = random.Random(1)
    tasks = []
    for i in range(n):
        kind, table = rng.choice(("count", "sum", "join", "group")), rng.choice(TABLES)
        city = rng.choice(("Graz", "Oslo", "Porto", "Lyon"))
        question, gold = {
            "count": (f"How many {table} are there in {city}?", f"SELECT count(*) FROM {table} WHERE city = '{city}'"),
            "sum": (
                f"What is the total amount of {table} from {city}?",
                f"SELECT sum(amount) FROM {table} WHERE city = '{city}'",
            ),
            "join": (
                f"List the names of customers in {city} who have {table}, each once, in alphabetical order.",
                f"SELECT DISTINCT c.name FROM customers c JOIN {table} t ON t.customer_id = c.id\n"
                f"WHERE c.city = '{city}' ORDER BY c.name",
            ),
            "group": (f"For each city, how many {table}?", f"SELECT city, count(*) FROM {table} GROUP BY city"),
        }[kind]
        tasks.append(Task(id=f"shop-{i:04d}", prompt=question, answer=gold, tags=(kind,)))
    return tasks


def shop_report(
    model: str, skill: float, *, seed: int, n: int = 300, failed: int = 0, hostile: bool = False
) -> EvalReport:
    rng, ease = random.Random(seed), random.Random(99)
    samples = []
    for i, task in enumerate(shop_tasks(n)):
        hard = {"count": -0.9, "sum": -0.3, "group": 0.3, "join": 1.4}[task.tags[0]] + ease.gauss(0, 0.8)
        ok = rng.random() < 1 / (1 + math.exp(-(skill - hard) * 1.6))
        gold = task.answer or ""
        text = (
            gold
            if ok
            else rng.choice(
                (gold.replace("count(*)", "sum(id)").replace("DISTINCT ", ""), gold.split("WHERE")[0], "SELECT")
            )
        )
        if hostile and i == 3:
            text = HOSTILE
        grade = Grade(
            score=float(ok),
            grader="sql_result",
            parts={"runs": float(text != "SELECT"), "rows match": float(ok)},
            rationale="" if ok else "the result has other rows than the reference",
        )
        if i < failed:
            grade = Grade(score=None, grader="sql_result", error="DatabaseError: the query ran past its limit of 2 s")
        samples.append(
            EvalSample(
                task=task,
                index=0,
                text=text,
                grade=grade,
                stop_reason=StopReason.LENGTH if text == "SELECT" else StopReason.EOS,
                num_tokens=len(text) // 3 + 1,
            )
        )
    kept = tuple(samples)
    return EvalReport(
        suite="shop-sql/held-out",
        suite_hash="5f" * 32,
        model=model,
        sampling=Sampling(temperature=0.0, max_tokens=96),
        metrics=evaluate.report_metrics(kept, (1,)),
        samples=kept,
        num_failed=failed,
        seconds=4.2,
        num_tokens=sum(sample.num_tokens for sample in kept),
    )


def log_metrics(run: RunFolder, steps: int = 200) -> None:
    rng = random.Random(5)
    for step in range(1, steps + 1):
        done = 1 - math.exp(-step / 60)
        row = {
            "reward": 0.55 + 0.36 * done + rng.gauss(0, 0.05),
            "reward_std": 0.4 - 0.25 * done + rng.gauss(0, 0.02),
            "loss": rng.gauss(0, 0.02),
            "completions/mean_length": 31 - 4 * done + rng.gauss(0, 0.8),
            "completions/clipped_ratio": max(0.0, 0.05 - 0.05 * done + rng.gauss(0, 0.01)),
            "entropy": 0.62 * math.exp(-step / 90) + 0.11 + rng.gauss(0, 0.015),
            "kl": 0.012 * done * step / 60 + abs(rng.gauss(0, 0.001)),
            "frac_reward_zero_std": 0.2 + 0.45 * done + rng.gauss(0, 0.06),
            "sampling/sampling_logp_difference/mean": abs(rng.gauss(0.0021, 0.0004)),
            "clip_ratio/low_mean": abs(rng.gauss(0.004, 0.002)),
            "clip_ratio/high_mean": abs(rng.gauss(0.009, 0.003)),
            "grad_norm": 0.8 + rng.expovariate(3),
            "lr": 7e-5 * min(1.0, step / 20),
            "num_tokens": 6100.0 * step,
            "rewards/sql_result/mean": 0.55 + 0.36 * done + rng.gauss(0, 0.05),
            "step_seconds": 0.8 + rng.expovariate(20),
        }
        if step % 25 == 0:
            row["eval/accuracy"] = 0.58 + 0.31 * done
        run.tracker.log(row, step)


def shop_run(root: Path, *, hostile: bool = False) -> evaluate.RunReport:
    """The whole story: base, SFT, GRPO; a refusal, promotions and a roll-back."""
    runs = root / "runs"
    with Registry(runs / "registry.db") as registry, RunFolder.create(runs, "flywheel", {"seed": 0, "lr": 7e-5}) as run:
        registry.add_run(run)
        log_metrics(run)
        raw = registry.add_artifact(b"raw tables", kind="dataset", name="shop-sql/schema-and-templates")
        rows = registry.add_artifact(
            b"rows",
            kind="dataset",
            name="shop-sql/train",
            parents=[raw.id],
            run=run.id,
            meta={"contamination": {"shop-sql/held-out": 0.0}},
        )
        pairs = registry.add_artifact(b"pairs", kind="dataset", name="shop-sql/sft-pairs", parents=[raw.id], run=run.id)
        tokens = registry.add_artifact(
            b"bpe", kind="tokenizer", name="shop-sql/bpe-512", parents=[pairs.id], run=run.id
        )
        models, reports = [], []
        for i, (name, skill, parents) in enumerate(
            [("base", -3.2, [tokens.id]), ("sft", 0.7, [pairs.id]), ("grpo", 2.3, [rows.id])]
        ):
            above = [*parents, *([models[-1].id] if models else [])]
            made = registry.add_artifact(
                name.encode(), kind="model", name=f"shop-sql/{name}", parents=above, run=run.id
            )
            report = shop_report(
                made.id, skill, seed=i, failed=2 if name == "sft" else 0, hostile=hostile and name == "grpo"
            )
            registry.add_report(report, made.id)
            models.append(made)
            reports.append(report)
        base, sft, grpo = models
        project, gate = "shop-sql", Gate()
        registry.promote(project, registry.card(base.id), gate=gate, actor="ada", reason="first model")
        first = evaluate.compare(reports[1], reports[0])
        registry.promote(project, registry.card(sft.id), comparison=first, gate=gate, actor="ada")
        timid = registry.add_artifact(
            b"timid", kind="model", name="shop-sql/grpo-lr-1e-6", parents=[sft.id], run=run.id
        )
        weak = shop_report(timid.id, 0.78, seed=7)
        registry.add_report(weak, timid.id)
        try:
            registry.promote(
                project,
                registry.card(timid.id),
                comparison=evaluate.compare(weak, reports[1]),
                gate=gate,
                actor="nightly",
            )
        except GateRefused as refusal:
            run.event("refused", reason=str(refusal))
        last = evaluate.compare(reports[2], reports[1])
        registry.promote(project, registry.card(grpo.id), comparison=last, gate=gate, actor="nightly")
        registry.rollback(project, actor="ada", reason="complaints about joins" + (HOSTILE if hostile else ""))
        registry.rollback(project, to=grpo.id, actor="ada", reason="the complaints were about the schema")
        return evaluate.build_run_report(
            run,
            title="Text to SQL for a shop" + (HOSTILE if hostile else ""),
            subtitle="A 1.9 M-parameter decoder learns to query four tables: "
            "supervised fine-tuning on 250 pairs, then reinforcement learning against the database.",
            stages=[
                evaluate.Stage(name="Base", report=reports[0], note="random weights"),
                evaluate.Stage(
                    name="SFT", report=reports[1], tokens=412_000, seconds=35.2, note="250 pairs, 40 epochs"
                ),
                evaluate.Stage(
                    name="GRPO", report=reports[2], tokens=1_220_000, seconds=163.0, note="200 steps, 24 prompts × 8"
                ),
            ],
            comparisons=[first, last],
            facts={"seed": "0", "machine": "2 cores, no GPU"},
            registry=registry,
            model=grpo.id,
            project=project,
        )
