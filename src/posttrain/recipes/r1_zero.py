"""R1-Zero: reinforcement learning from rule rewards on a base model, without a single worked example.

DeepSeek-AI, https://arxiv.org/abs/2501.12948 and Nature 645 (2025), 633-638. A base model is asked to reason between
`<think>` tags and to answer between `<answer>` tags; GRPO rewards right answers and the right form, the same for each,
and nothing else: no SFT before it, no reward model. Reward and length of the answers are recorded at every step. With
`--later-stage` follows what R1 did next: answers of the tuned model that are right and well formed are kept, and the
base model, begun anew, imitates them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from posttrain.core import Grader, Task, read_metrics, recipe
from posttrain.data import CompletionRow
from posttrain.models import resolve
from posttrain.recipes.paper_data import ByFile, Data, Splits, keep_data, load_tasks, sources_of, tasks_of
from posttrain.recipes.paper_evaluation import Evaluation, Measured
from posttrain.recipes.paper_pairs import completion_of
from posttrain.recipes.paper_rewards import Asking, TaggedAnswer, asked, rule_rewards
from posttrain.recipes.paper_settings import R1, settings_of
from posttrain.recipes.paper_stages import model_id, reinforced, trained
from posttrain.recipes.policy import load_policy
from posttrain.recipes.rejection_sampling import RejectionSampling, sample_round
from posttrain.recipes.rl_settings import Grpo, with_variant
from posttrain.recipes.sft import run_sft, sft
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench

RIGHT_IN_FORM = 2.0  # what `rule_rewards` gives a right answer in the right form


@recipe
def r1_zero(
    *,
    model: str,
    prompts: tuple[str, ...],
    dev: tuple[str, ...],
    unseen: tuple[str, ...] = (),
    grader: str = "maths",
    ask: Asking = "instructed",
    later_stage: bool = False,
    size: Literal["published", "tiny"] = "published",
    lr: float | None = None,
    beta: float | None = None,
    clip: float | None = None,
    steps: int | None = None,
    prompts_per_step: int | None = None,
    group_size: int | None = None,
    minibatches: int | None = None,
    reference_every: int | None = None,
    max_tokens: int | None = None,
    samples: int | None = None,
    sft_lr: float | None = None,
    sft_epochs: float | None = None,
    sft_batch: int | None = None,
    slots: int = 128,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """R1-Zero: GRPO on a base model with rule rewards for accuracy and form; optionally imitation of its best answers.

    Files of tasks are given as PATH, or PATH=GRADER where the file has another grader than `grader`.

    Args:
        model: folder of the base model, or a Hugging Face name.
        prompts: files of questions with answers that can be verified.
        dev: files of tasks that are measured as the run goes.
        unseen: files of tasks that are asked once, at the end.
        grader: exact, number, maths, sql:DATABASE[,DATABASE], or FILE.py:NAME; judges what stands in the answer's tags.
        ask: instructed (plain text that asks for the form), chat (the same as a system turn), or plain.
        later_stage: then keep the tuned model's right answers, and have the base model imitate them.
        size: whose settings to begin with: those published, or tiny.
        lr: learning rate.
        beta: weight of the KL to the reference.
        clip: epsilon of the clipped ratio, to both sides.
        steps: sampling steps.
        prompts_per_step: questions per sampling step.
        group_size: answers per question.
        minibatches: updates per sampling step.
        reference_every: sampling steps after which the reference becomes the policy.
        max_tokens: new tokens per answer, in training and evaluation.
        samples: answers per question in the later stage.
        sft_lr: learning rate of the later stage.
        sft_epochs: epochs of the later stage.
        sft_batch: answers per step of the later stage.
        slots: answers sampled at the same time.
        dtype: of the trainer's matrix products.
        device: cpu, cuda, cuda:0 …
        seed: of everything.
        runs: folder of runs.
        resume: run folder to go on with; stages that have finished are not repeated.
    """
    options: dict[str, Any] = dict(locals())
    settings = settings_of(R1, options)
    with open_workbench("r1_zero", options, runs=runs, resume=resume) as bench:
        # The evaluation first, then questions without it; the instruction comes after, it would match everywhere.
        measured = sources_of([*dev, *unseen], grader)
        splits = {"dev": load_tasks(measured[: len(dev)]), "unseen": load_tasks(measured[len(dev) :])}
        verifiable = sources_of(prompts, grader)
        questions = tasks_of(bench, "questions", verifiable, splits)
        tasks = [asked(task, ask) for task in questions.rows]
        evaluation = Evaluation(
            bench,
            {split: [asked(task, ask) for task in own] for split, own in splits.items()},
            TaggedAnswer(ByFile(measured), strict=False),
            settings["max_tokens"],
            device=device,
            slots=slots,
        )
        rules = rule_rewards(ByFile(verifiable))
        base = Measured("base", resolve(model))
        model_id(bench, base.folder)  # in the lineage from the beginning

        zero = Measured(
            "zero",
            reinforced(
                bench,
                "zero",
                base.folder,
                tasks,
                rules,
                rl_config(settings),
                data=questions.id,
                dev=evaluation.dev_suite(base.folder),
                device=device,
            ),
        )
        say_course(bench, "zero")
        models = [base, zero]
        if later_stage:
            chosen = right_answers(bench, zero, questions.id, tasks, rules, settings, splits)
            models.append(Measured("imitation", imitate(bench, base, chosen, settings)))

        evaluation.finish(
            models,
            title=f"R1-Zero from {base.folder.name}",
            notes=[
                f"{questions.num_dropped} questions gave evaluation tasks away and were dropped.",
                "In the evaluation an answer without tags is judged as a whole: what is gained is not the form alone.",
            ],
            curves=[one.name for one in models[1:]],
        )
        return models[-1].folder


def rl_config(settings: Mapping[str, Any]) -> Grpo:
    """GRPO as DeepSeekMath has it, with R1-Zero's settings: the reference follows the policy in steps."""
    steps = settings["steps"]
    names = ("lr", "beta", "steps", "prompts_per_step", "group_size", "minibatches", "reference_every", "max_tokens")
    own = {name: settings[name] for name in (*names, "slots", "dtype", "seed")}
    clips = {"clip_low": settings["clip"], "clip_high": settings["clip"]}
    every = {"evaluate_every": max(1, steps // 10), "checkpoint_every": max(1, steps // 20), "kl_prompts": 32}
    return with_variant("grpo", {**own, **clips, **every, "full_marks": RIGHT_IN_FORM})


def say_course(bench: Workbench, stage: str) -> None:
    """How reward, form and length have gone, from the first tenth of the steps to the last."""
    rows = read_metrics(bench.run.path.with_name(f"{bench.run.id}-{stage}") / "metrics.jsonl")
    tenth = max(1, len(rows) // 10)
    for name, words in (
        ("rewards/accuracy/mean", "accuracy"),
        ("rewards/format/mean", "form"),
        ("completions/mean_length", "tokens per answer"),
    ):
        first, last = (sum(row[name] for row in part) / len(part) for part in (rows[:tenth], rows[-tenth:]))
        bench.say(f"{words}: {first:.3g} in the first {tenth} steps, {last:.3g} in the last")


def right_answers(
    bench: Workbench,
    tuned: Measured,
    questions: str,
    tasks: Sequence[Task],
    rules: Grader,
    settings: Mapping[str, Any],
    splits: Splits,
) -> Data[CompletionRow]:
    """Rejection sampling (R1, section 2.3.3): of several answers to every question those that are right and in form."""
    config = RejectionSampling(
        samples=settings["samples"],
        keep="correct",
        threshold=RIGHT_IN_FORM,
        per_prompt=2,
        max_tokens=settings["max_tokens"],
        slots=settings["slots"],
        seed=settings["seed"],
    )

    def make() -> list[CompletionRow]:
        policy = load_policy(str(tuned.folder), device=settings["device"])
        chosen, metrics = asyncio.run(sample_round(bench, policy, tasks, rules, config, 1))
        bench.say(f"{len(chosen)} right answers to {metrics['selected/prompts']:.0f} of {len(tasks)} questions kept")
        return [completion_of(kept) for kept in chosen]

    parents = [questions, model_id(bench, tuned.folder)]
    return keep_data(bench, "right-answers", CompletionRow, make, splits, parents=parents)


def imitate(bench: Workbench, base: Measured, chosen: Data[CompletionRow], settings: Mapping[str, Any]) -> Path:
    """SFT of the base model, begun anew, on the answers that were kept."""
    return trained(
        bench,
        "imitation",
        sft,
        run_sft,
        model=str(base.folder),
        data=chosen.path,
        lr=settings["sft_lr"],
        epochs=settings["sft_epochs"],
        batch_size=settings["sft_batch"],
        max_length=settings["max_tokens"] * 2,
        held_out=0,
        device=settings["device"],
        dtype=settings["dtype"],
        seed=settings["seed"],
    )
