"""A reward model from preferences: ranked answers in, a model that scores answers out.

The loss is Bradley–Terry over all ordered pairs of a prompt's answers (edited > chosen > rejected), each prompt
counting the same. Rows of one prompt are either trained on or held out, never both. The saved folder is a
`…ForSequenceClassification` that `transformers` loads; it is a grader (`reward_scoring.load_reward(…).scorer()`) and
the start of a critic (`models.load_scored`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from posttrain.core import recipe
from posttrain.evaluate import (
    ScoredPair,
    Stage,
    as_eval_report,
    build_run_report,
    compare,
    report_html,
    report_json,
    reward_report,
)
from posttrain.recipes.reward_loop import RewardLoop, reward_loop, split_by_prompt, target_scores
from posttrain.recipes.reward_rows import Ranked, load_ranked, ranked_examples
from posttrain.recipes.reward_scoring import RewardFormat, RewardPolicy, load_reward
from posttrain.recipes.supervised import steps_of
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench
from posttrain.train import TrainConfig, Trainer, reward_objective, score_forward


@recipe
def reward_model(
    *,
    model: str,
    data: Path,
    eval_data: Path | None = None,
    columns: str | None = None,
    edited: str | None = None,
    tags: tuple[str, ...] = (),
    margin: bool = False,
    chat: bool = False,
    template: Path | None = None,
    limit: int | None = None,
    held_out: int = 128,
    ranking: Literal["pairs", "plackett_luce"] = "pairs",
    center: float = 0.01,
    label_smoothing: float = 0.0,
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
    name: str = "reward-model",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Train a reward model on preferences.

    Learning rate and the one epoch are Tülu 3's for 8B and 70B, from the SFT model (arXiv 2411.15124); ranks with
    edited answers and no margin are Llama 3's (arXiv 2407.21783); centring is Eisenstein et al.'s (arXiv 2312.09244). A
    small model made from nothing wants 1e-4 to 1e-3.

    Args:
        model: folder of the model to start from, usually the SFT model, or a Hugging Face name; a reward model goes on.
        data: rows with chosen and rejected: JSONL, parquet, CSV, a saved `datasets` folder; TRL, HH-RLHF, ShareGPT.
        eval_data: rows to evaluate on; without it some of `data` are held out.
        columns: which columns to read, as `prompt=question,chosen=better`.
        edited: column with an answer better than the chosen one, where somebody wrote one.
        tags: columns whose values are reported separately.
        margin: ask for the rows' margins (`margin`, or `score_chosen` − `score_rejected`).
        chat: wrap plain text prompts and answers as turns of the chat template.
        template: a chat template file that replaces the model's own.
        limit: read at most this many rows.
        held_out: rows kept apart to evaluate on, where there is no `eval_data`.
        ranking: all ordered pairs, or the Plackett–Luce likelihood of the whole ranking (no margins).
        center: coefficient of the centring term.
        label_smoothing: share of preferences taken to be the wrong way round.
        epochs: how often each row is seen; reward models overfit after one.
        batch_size: rows per optimiser step.
        lr: peak learning rate.
        schedule: course of the learning rate after warm-up.
        warmup: fraction of the steps.
        weight_decay: of matrices.
        max_length: rows with a longer prompt and answer are left out and counted, tokens.
        micro_tokens: tokens per packed micro-batch.
        dtype: of matrix products; master weights are float32.
        device: cpu, cuda, cuda:0 …
        seed: decides the head's start, the order and the held-out rows.
        name: of the reward model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    options = dict(locals())
    with open_workbench("reward_model", options, runs=runs, resume=resume) as bench:
        return run_reward_model(bench, options)


def run_reward_model(bench: Workbench, options: Mapping[str, Any]) -> Path:
    """The recipe's work in a run that is open: its own, or a stage of a longer recipe.

    Args:
        bench: the run.
        options: those of `reward_model`, all of them, by name.

    Returns:
        The run's folder; the model is in its `model`, registered as `options["name"]`.
    """
    policy = load_reward(options["model"], device=options["device"], template=options["template"], seed=options["seed"])
    longest = min(options["max_length"], policy.model.config.max_positions)

    def read(path: Path, limit: int | None) -> list[Ranked]:
        loaded = load_ranked(
            bench, path, columns=options["columns"], edited=options["edited"], tags=options["tags"], limit=limit
        )
        return ranked_examples(bench, policy, loaded, longest, chat=options["chat"], margin=options["margin"])

    ranked = read(options["data"], options["limit"])
    if options["eval_data"] is None:
        kept, apart = split_by_prompt(ranked, options["held_out"], options["seed"], example=lambda row: row.example)
    else:
        apart = read(options["eval_data"], None)
        known = {row.example.group for row in apart}
        kept = [row for row in ranked if row.example.group not in known]
        bench.say(f"{len(ranked) - len(kept)} training rows have a prompt of the evaluation and are left out")
    steps = steps_of(len(kept), options["batch_size"], options["epochs"])
    train = TrainConfig(
        lr=options["lr"],
        schedule=options["schedule"],
        warmup=options["warmup"],
        weight_decay=options["weight_decay"],
        total_steps=steps,
        micro_tokens=options["micro_tokens"],
        dtype=options["dtype"],
        seed=options["seed"],
    )
    objective = reward_objective(
        ranking=options["ranking"], center=options["center"], label_smoothing=options["label_smoothing"]
    )
    trainer = Trainer(policy.model, train, objective, forward=score_forward)
    before = scored_pairs(trainer, apart) if len(apart) > 1 else []

    def measure() -> dict[str, float]:
        if not before:
            return {}
        found = reward_report(scored_pairs(trainer, apart))
        return {"accuracy": found.accuracy.value, "margin": found.margin.value, "ece": found.calibration.ece}

    loop = RewardLoop(
        batch_size=options["batch_size"], steps=steps, evaluate_every=max(1, steps // 10), seed=options["seed"]
    )
    reward_loop(bench, trainer, [row.example for row in kept], loop, measure=measure, title="reward model")
    after = scored_pairs(trainer, apart) if before else []
    sources = [options["data"], *([options["eval_data"]] if options["eval_data"] else [])]
    return finish(bench, policy, before, after, sources, options["model"], options["name"])


def scored_pairs(trainer: Trainer, ranked: Sequence[Ranked]) -> list[ScoredPair]:
    """All ordered pairs of each row, scored; those of a row share a cluster."""
    pairs = []
    for row, scores in zip(ranked, target_scores(trainer, [row.example for row in ranked]), strict=True):
        several = len(scores) > 2
        for better, worse in itertools.combinations(range(len(scores)), 2):
            pairs.append(
                ScoredPair(
                    id=f"{row.example.id}/{better}-{worse}" if several else row.example.id,
                    chosen=scores[better][0],
                    rejected=scores[worse][0],
                    chosen_length=row.lengths[better],
                    rejected_length=row.lengths[worse],
                    tags=row.tags,
                    cluster=row.example.group,
                    prompt=row.prompt,
                    chosen_text=row.answers[better],
                    rejected_text=row.answers[worse],
                )
            )
    return pairs


def finish(
    bench: Workbench,
    policy: RewardPolicy,
    before: Sequence[ScoredPair],
    after: Sequence[ScoredPair],
    sources: Sequence[Path],
    start: str,
    name: str,
) -> Path:
    """Save, register, and report with intervals: `reward_report.json`, `comparison.json` (with the untrained head) and
    `report.html` of the run."""
    form = RewardFormat()
    report = reward_report(after) if after else None
    if report is not None:
        form = RewardFormat(mean=report.mean_reward, std=report.std_reward)
    folder = policy.save(bench.run.path / "model", form)
    registry = bench.registry
    parents = [registry.add_artifact(path, kind="dataset", name=path.name, storage="reference").id for path in sources]
    parents.append(registry.add_artifact(policy.path, kind="model", name=start, storage="reference").id)
    registry.add_run(bench.run)
    card = registry.add_artifact(
        folder, kind="model", name=name, parents=parents, run=bench.run.id, storage="reference"
    )
    if report is not None:
        bench.say(report.summary())
        (bench.run.path / "reward_report.json").write_bytes(report.to_json() + b"\n")
        first = as_eval_report(before, suite="preferences", model=str(policy.path))
        last = as_eval_report(after, suite="preferences", model=card.id)
        report_json(last, bench.run.path / "report.json")
        against = compare(last, first)
        (bench.run.path / "comparison.json").write_bytes(against.to_json() + b"\n")
        page = build_run_report(
            bench.run,
            title=f"Reward model {name}",
            subtitle=f"{report.num_pairs} held-out pairs, {time.strftime('%Y-%m-%d')}",
            stages=[Stage(name="before", report=first), Stage(name="after", report=last)],
            comparisons=[against],
            notes=[*report.summary().splitlines(), "Reliability:", *report.calibration.table().splitlines()],
            registry=registry,
            model=card.id,
        )
        report_html(page, bench.run.report)
    bench.say(f"reward model {card.short()} in {folder}")
    return bench.run.path
