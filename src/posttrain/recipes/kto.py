"""Preference optimisation on answers that are each good or bad: KTO, BCO, APO-zero without pairs.

KTO weighs each answer's log-ratio against a reference point, the policy's KL to the reference, estimated before every
step on prompts with answers to other prompts; BCO classifies implicit rewards around a shift, the mean of all rewards
so far, brought up to date before every step. Both are constants of the whole step, so accumulation and packing change
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from posttrain import objectives
from posttrain.core import Example, recipe
from posttrain.recipes.adapters import Lora
from posttrain.recipes.kl_report import report_kl
from posttrain.recipes.policy import Policy
from posttrain.recipes.preference_loop import Measured, Prepare, log_ratios_of, measure_labels, preference_loop
from posttrain.recipes.preference_rendering import label_examples, mismatched
from posttrain.recipes.preference_run import check_reference, get_ready, keep_tuned, load_labels
from posttrain.recipes.reference_cache import Reference
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench
from posttrain.train import Objective, Trainer, label_objective, with_step_scalars


class Method(NamedTuple):
    """One way to learn from labelled answers."""

    beta: float
    lr: float
    source: str


METHODS = {
    "kto": Method(0.1, 5e-6, "KTO, arXiv 2402.01306, and its authors' code (batch 8 to 128)"),
    "bco": Method(0.01, 5e-7, "BCO, arXiv 2404.04656, appendix C (batch 128)"),
    "apo_zero_unpaired": Method(0.1, 2e-7, "APO, arXiv 2408.06266, section 5.2, taken apart as in TRL"),
}

Loss = Literal["kto", "bco", "apo_zero_unpaired"]


@recipe
def kto(
    *,
    model: str,
    data: Path,
    loss: Loss = "kto",
    beta: float | None = None,
    lr: float | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reward_shift: Literal["running", "step"] = "running",
    reference: Literal["cached", "adapters-off"] = "cached",
    lora_rank: int = 0,
    kl_prompts: int = 16,
    columns: str | None = None,
    chat: bool = False,
    template: Path | None = None,
    limit: int | None = None,
    held_out: int = 64,
    evaluation: tuple[Path, ...] = (),
    epochs: float = 1.0,
    batch_size: int = 32,
    warmup: float = 0.1,
    max_length: int = 2048,
    micro_tokens: int = 8192,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    name: str = "kto",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Preference optimisation on single answers labelled good or bad: KTO, BCO.

    Args:
        model: folder of the model to tune, or a Hugging Face name.
        data: answers with a label; pairs are taken apart.
        loss: kto, bco or apo_zero_unpaired.
        beta: strength of the pull to the reference. None takes the method's published one.
        lr: peak learning rate, linear schedule. None takes the method's published one (for models of billions), with
            adapters ten times that.
        desirable_weight: weight of good answers; with unequal numbers, weight times number should be about equal.
        undesirable_weight: weight of bad answers.
        reward_shift: of bco: running (mean of all rewards so far), or step (middle between good and bad of each step).
        reference: cached (logprobs of the starting weights, computed once), or adapters-off (needs lora_rank).
        lora_rank: rank of adapters; 0 tunes all weights.
        kl_prompts: fixed prompts of the data on which the KL to the start is measured at the end; 0: none.
        columns: which columns to read, as `prompt=question,completion=answer,label=good`.
        chat: wrap plain text prompts and answers as turns of the chat template.
        template: a chat template file that replaces the model's own.
        limit: read at most this many rows.
        held_out: answers kept apart to measure on.
        evaluation: files of evaluation tasks; rows that give one of them away are dropped, counted and kept in lineage.
        epochs: how often each answer is seen.
        batch_size: answers per optimiser step.
        warmup: fraction of the steps.
        max_length: longer answers are left out and counted, tokens.
        micro_tokens: tokens per packed micro-batch.
        dtype: of matrix products; master weights are float32.
        device: cpu, cuda, cuda:0 …
        seed: decides order and the held-out answers.
        name: of the tuned model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    return _run(dict(locals()))


def _run(options: dict[str, Any]) -> Path:
    method = METHODS[options["loss"]]
    beta = method.beta if options["beta"] is None else options["beta"]
    method = method._replace(beta=beta, lr=Lora.of(options).lr(options["lr"], method.lr))
    check_reference(options)
    with open_workbench("kto", options, runs=options["runs"], resume=options["resume"]) as bench:

        def make(policy: Policy, longest: int) -> list[Example]:
            return label_examples(bench, policy.renderer, load_labels(bench, options), longest, chat=options["chat"])

        ready = get_ready(
            bench,
            options,
            objective=objective_of(options, method),
            lr=method.lr,
            mode=options["reference"],
            make=make,
        )
        trainer, reference = ready.trainer, ready.reference
        say_balance(bench, ready.examples, options)
        bench.say(
            f"{options['loss']}: beta {method.beta:g}, lr {method.lr:g}, {ready.loop.steps} steps ({method.source})"
        )
        memory = {"shift": 0.0, "count": 0.0}
        answers, held_out = (reference.before_training(part) for part in (ready.examples, ready.held_out))

        def measure() -> Measured:
            return measure_labels(trainer, reference.at_step(held_out), beta=method.beta)

        summary = preference_loop(
            bench,
            trainer,
            answers,
            ready.loop,
            prepare=prepare_with(options, method, trainer, reference, answers, memory),
            memory=memory,
            measure=measure if held_out else None,
            title="kto",
        )
        parts = [*ready.examples, *ready.held_out]
        report_kl(bench, ready.policy, parts, num_prompts=options["kl_prompts"], seed=options["seed"])
        keep_tuned(bench, options, ready.policy, ready.data_id)
        if "eval/rewards/auc" in summary.get("after", {}):
            before, after = (summary[when]["eval/rewards/auc"] for when in ("before", "after"))
            bench.say(f"a held-out good answer is above a bad one: {before:.1%} → {after:.1%}, {len(held_out)} answers")
        return bench.run.path


def objective_of(options: Mapping[str, Any], method: Method) -> Objective:
    """The trainer's objective, and which of its arguments are constants of a step."""
    if options["loss"] == "bco":
        return label_objective(objectives.bco, step={"reward_shift": "reward_shift"}, beta=method.beta)
    weights = {name: options[name] for name in ("desirable_weight", "undesirable_weight")}
    if options["loss"] == "apo_zero_unpaired":
        return label_objective(objectives.apo_zero_unpaired, beta=method.beta, **weights)
    return label_objective(objectives.kto, step={"kl": "kl"}, beta=method.beta, **weights)


def prepare_with(
    options: Mapping[str, Any],
    method: Method,
    trainer: Trainer,
    reference: Reference,
    answers: Sequence[Example],
    memory: MutableMapping[str, float],
) -> Prepare:
    """What a step's answers need: the reference where it is worked out at each step, and the step's constant.

    Args:
        memory: BCO's `shift` and the `count` of answers that it is the mean of; brought up to date at every step.
    """

    def constant(step: Sequence[Example]) -> dict[str, float]:
        if options["loss"] == "kto":
            others = reference.at_step([other[example.id] for example in step])
            return {"kl": float(objectives.kl_baseline(torch.tensor(log_ratios_of(trainer, others))))}
        if options["loss"] == "bco":
            labels = torch.tensor([example.scalars["label"] for example in step])
            rewards = method.beta * torch.tensor(log_ratios_of(trainer, step))
            if options["reward_shift"] == "step":
                return {"reward_shift": float(objectives.bco_shift(rewards, labels))}
            memory["shift"], memory["count"] = objectives.bco_running_shift(rewards, **memory)
            return {"reward_shift": memory["shift"]}
        return {}

    other: dict[str, Example] = {}
    if options["loss"] == "kto":
        longest = min(options["max_length"], trainer.model.config.max_positions)
        made = reference.before_training(mismatched(answers, longest, options["seed"]))
        other = {example.id: example for example in made}

    def prepare(step: Sequence[Example]) -> list[Example]:
        step = reference.at_step(step)
        return with_step_scalars(step, **constant(step))

    return prepare


def say_balance(bench: Workbench, answers: Sequence[Example], options: Mapping[str, Any]) -> None:
    """How many answers are good and bad, and whether the weights make up for it (KTO, equation 8)."""
    good = sum(example.scalars["label"] > 0.5 for example in answers)
    bad = len(answers) - good
    bench.say(f"{good} good and {bad} bad answers")
    if options["loss"] == "bco" or not good or not bad:
        return
    ratio = options["desirable_weight"] * good / (options["undesirable_weight"] * bad)
    if not 1 <= ratio <= 4 / 3:
        bench.say(
            f"weight times number of good answers is {ratio:.2f} times that of bad ones; KTO's authors advise 1 to "
            f"1.33: --desirable-weight {options['undesirable_weight'] * bad / good:.2f}"
        )
