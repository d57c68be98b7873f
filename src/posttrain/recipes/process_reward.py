"""A process reward model from answers in labelled steps: is the solution still right here?

Rows are TRL's stepwise supervision (prompt, completions, labels). The steps are joined by a separator; the model judges
each at the token with the last character of its separator, and the last step at the token that ends the answer. One
logit for each step and cross-entropy: the probability that the solution is right so far. The saved folder is a
`…ForSequenceClassification` whose number at the answer's end is the outcome's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from posttrain import data as rows
from posttrain.core import Comparison, recipe
from posttrain.evaluate import ScoredSteps, build_run_report, mcnemar, paired_bootstrap, report_html, step_report
from posttrain.recipes.reward_loop import RewardLoop, reward_loop, split_by_prompt, target_scores
from posttrain.recipes.reward_rows import Stepped, stepped_examples
from posttrain.recipes.reward_scoring import RewardFormat, RewardPolicy, load_reward
from posttrain.recipes.supervised import steps_of
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench
from posttrain.train import TrainConfig, Trainer, process_objective, score_forward


@recipe
def process_reward(
    *,
    model: str,
    data: Path,
    columns: str | None = None,
    separator: str = "\n\n",
    until_first_error: bool = False,
    positive_weight: float = 1.0,
    normalise: Literal["token", "sequence", "group"] = "token",
    chat: bool = False,
    template: Path | None = None,
    limit: int | None = None,
    held_out: int = 128,
    epochs: float = 1.0,
    batch_size: int = 64,
    lr: float = 3e-6,
    schedule: Literal["linear", "cosine", "constant"] = "linear",
    warmup: float = 0.03,
    weight_decay: float = 0.0,
    max_length: int = 2048,
    micro_tokens: int = 8192,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    name: str = "process-reward",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Train a process reward model on answers in labelled steps.

    Steps, labels and the separator are TRL's stepwise supervision; one epoch, as reward models overfit after it. The
    learning rate is that of Tülu 3's reward model (arXiv 2411.15124); a small model made from nothing wants 1e-4 to
    1e-3.

    Args:
        model: folder of the model to start from, or a Hugging Face name; a reward model goes on.
        data: rows with a prompt, the steps of an answer (`completions`) and a label for each (`labels`).
        columns: which columns to read, as `prompt=question,completions=steps`.
        separator: put between the steps; a line feed is written as such.
        until_first_error: learn nothing from what follows the first wrong step.
        positive_weight: how much more a right step counts; most are right, so below 1 where they drown the wrong ones.
        normalise: what the loss is a mean over: token (all steps count the same), sequence (all answers), group.
        chat: wrap plain text prompts and answers as turns of the chat template.
        template: a chat template file that replaces the model's own.
        limit: read at most this many rows.
        held_out: rows kept apart to evaluate on.
        epochs: how often each row is seen.
        batch_size: rows per optimiser step.
        lr: peak learning rate.
        schedule: course of the learning rate after warm-up.
        warmup: fraction of the steps.
        weight_decay: of matrices.
        max_length: longer rows are left out and counted, tokens.
        micro_tokens: tokens per packed micro-batch.
        dtype: of matrix products; master weights are float32.
        device: cpu, cuda, cuda:0 …
        seed: decides the head's start, the order and the held-out rows.
        name: of the model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    options = dict(locals())
    separator = separator.replace("\\n", "\n")
    with open_workbench("process_reward", options, runs=runs, resume=resume) as bench:
        policy = load_reward(model, device=device, template=template, seed=seed)
        where = bench.run.path / "bad_rows.jsonl"
        loaded = rows.load(data, kind="steps", columns=columns, limit=limit, quarantine=where)
        bench.say(loaded.report.summary())
        longest = min(max_length, policy.model.config.max_positions)
        stepped = stepped_examples(
            bench, policy, loaded, longest, separator=separator, chat=chat, until_first_error=until_first_error
        )
        kept, apart = split_by_prompt(stepped, held_out, seed, example=lambda row: row.example)
        steps = steps_of(len(kept), batch_size, epochs)
        train = TrainConfig(
            lr=lr,
            schedule=schedule,
            warmup=warmup,
            weight_decay=weight_decay,
            total_steps=steps,
            micro_tokens=micro_tokens,
            dtype=dtype,
            seed=seed,
        )
        objective = process_objective(normalise=normalise, positive_weight=positive_weight)
        trainer = Trainer(policy.model, train, objective, forward=score_forward)

        before = scored_steps(trainer, apart)

        def measure() -> dict[str, float]:
            if not apart:
                return {}
            found = step_report(scored_steps(trainer, apart))
            return {"accuracy": found.accuracy.value, "ece": found.calibration.ece}

        loop = RewardLoop(batch_size=batch_size, steps=steps, evaluate_every=max(1, steps // 10), seed=seed)
        reward_loop(bench, trainer, [row.example for row in kept], loop, measure=measure, title="process reward")
        form = RewardFormat(kind="process", separator=separator)
        return finish(bench, policy, before, scored_steps(trainer, apart), form, data, model, name)


def scored_steps(trainer: Trainer, stepped: Sequence[Stepped]) -> list[ScoredSteps]:
    """The labelled steps of each answer with their logits."""
    found = []
    for row, scores in zip(stepped, target_scores(trainer, [row.example for row in stepped]), strict=True):
        labels = tuple(label for label in row.labels if label is not None)
        found.append(ScoredSteps(id=row.example.id, scores=scores[0], labels=labels))
    return found


def compare_steps(
    candidate: Sequence[ScoredSteps], champion: Sequence[ScoredSteps], *, names: tuple[str, str], seed: int = 0
) -> Comparison:
    """Two models' word on the same steps, paired by answer, since the steps of one answer are not independent.

    Each answer gives the share of its steps that a model tells rightly. The difference is the mean over answers with a
    paired bootstrap; wins and losses are answers, and their p is the sign test's.

    Args:
        names: of candidate and champion.
    """

    def shares(answers: Sequence[ScoredSteps]) -> list[float]:
        told = [
            [
                (score > 0) == (label > 0.5)
                for score, label in zip(each.scores, each.labels, strict=True)
                if label is not None
            ]
            for each in answers
        ]
        return [sum(own) / len(own) for own in told]

    ours, theirs = shares(candidate), shares(champion)
    difference = paired_bootstrap(ours, theirs, seed=seed)
    wins = sum(one > other for one, other in zip(ours, theirs, strict=True))
    losses = sum(one < other for one, other in zip(ours, theirs, strict=True))
    p_value = mcnemar(wins, losses)
    return Comparison(
        suite="steps",
        candidate=names[0],
        champion=names[1],
        difference=difference,
        wins=wins,
        losses=losses,
        ties=len(ours) - wins - losses,
        p_value=p_value,
        better=difference.low > 0 and p_value <= 0.05,
    )


def finish(
    bench: Workbench,
    policy: RewardPolicy,
    before: Sequence[ScoredSteps],
    answers: Sequence[ScoredSteps],
    form: RewardFormat,
    source: Path,
    start: str,
    name: str,
) -> Path:
    """Save, register, and report with intervals: `step_report.json`, `comparison.json` (with the untrained
    head) and `report.html` of the run."""
    folder = policy.save(bench.run.path / "model", form)
    registry = bench.registry
    parents = [
        registry.add_artifact(source, kind="dataset", name=source.name, storage="reference").id,
        registry.add_artifact(policy.path, kind="model", name=start, storage="reference").id,
    ]
    registry.add_run(bench.run)
    card = registry.add_artifact(
        folder, kind="model", name=name, parents=parents, run=bench.run.id, storage="reference"
    )
    if answers:
        report = step_report(answers)
        bench.say(report.summary())
        (bench.run.path / "step_report.json").write_bytes(report.to_json() + b"\n")
        if len(answers) > 1:
            against = compare_steps(answers, before, names=(card.id, str(policy.path)))
            (bench.run.path / "comparison.json").write_bytes(against.to_json() + b"\n")
        page = build_run_report(
            bench.run,
            title=f"Process reward model {name}",
            subtitle=f"{report.num_steps} steps of {report.num_answers} held-out answers",
            notes=[*report.summary().splitlines(), "Reliability:", *report.calibration.table().splitlines()],
            registry=registry,
            model=card.id,
        )
        report_html(page, bench.run.report)
    bench.say(f"process reward model {card.short()} in {folder}")
    return bench.run.path
