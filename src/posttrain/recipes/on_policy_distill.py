"""On-policy distillation: the student writes, the teacher says of every token what it thinks, the student follows.

Two ways to follow:

    policy        each sampled token's advantage is log teacher − log student, minus a one-sample estimate of the
                  reverse KL; a policy gradient with those, no return (Thinking Machines Lab, "On-Policy Distillation").
                  The teacher only scores what is there, which an endpoint with `prompt_logprobs` does too
    reverse_kl, forward_kl, jsd
                  the whole distribution at every token of the student's samples (GKD, arXiv 2306.13649). Less noise
                  per sample; needs the teacher's weights

`on_policy` below 1 mixes in steps on the data's completions with the same loss (GKD's lambda).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from posttrain import data as rows
from posttrain.core import Config, DataError, Example, Sampling, Task, UsageError, doc, generator, read_metrics, recipe
from posttrain.data import CompletionRow
from posttrain.models import resolve
from posttrain.recipes.decontaminate import without_evaluation
from posttrain.recipes.distill import beta_of
from posttrain.recipes.kl_report import report_kl
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.sft import completion_examples
from posttrain.recipes.teacher_scores import Scorer, mean_reverse_kl
from posttrain.recipes.teachers import RemoteTeacher, is_endpoint, load_teacher, shared_entries
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench
from posttrain.rollout import PromptSchedule, check_failures, rollout_metrics, run_groups, to_examples
from posttrain.train import (
    Ledger,
    TrainConfig,
    Trainer,
    distillation_objective,
    load_latest,
    policy_objective,
    save_checkpoint,
    teacher_forward,
    token_forward,
)

SHOWN: tuple[str, ...] = ("reverse_kl", "divergence", "entropy")


class OnPolicy(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the loop."""

    steps: Annotated[int, doc("optimiser steps", ge=1)]
    prompts_per_step: Annotated[int, doc("prompts per step", ge=1)] = 16
    samples: Annotated[int, doc("answers per prompt", ge=1)] = 4
    max_tokens: Annotated[int, doc("new tokens per answer", ge=1)] = 256
    loss: Annotated[Literal["policy", "forward_kl", "reverse_kl", "jsd"], doc("how to follow the teacher")] = "policy"
    beta: Annotated[float, doc("of jsd: 0 is forward KL, 1 reverse KL", ge=0, le=1)] = 0.5
    softness: Annotated[float, doc("temperature of both distributions in a divergence", gt=0)] = 1.0
    on_policy: Annotated[float, doc("GKD's lambda: share of steps on the student's own samples", ge=0, le=1)] = 1.0
    advantage_clip: Annotated[float | None, doc("bound on a token's advantage, nats; none: no bound")] = 10.0
    temperature: Annotated[float, doc("of the student's sampling", gt=0)] = 1.0
    importance_cap: Annotated[float | None, doc("truncated importance weights for sampler mismatch")] = 2.0
    lr: Annotated[float, doc("learning rate")] = 1e-6
    warmup: Annotated[float, doc("below 1 a fraction of the steps, else steps")] = 0.0
    max_failed: Annotated[float, doc("share of failed rollouts that stops the run")] = 0.05
    checkpoint_every: Annotated[int, doc("steps between checkpoints", ge=1)] = 20
    micro_tokens: Annotated[int, doc("tokens per packed micro-batch", ge=1)] = 8192
    dtype: Annotated[Literal["float32", "bfloat16"], doc("of the trainer's matrix products")] = "bfloat16"
    slots: Annotated[int, doc("answers sampled at the same time", ge=1)] = 256
    seed: Annotated[int, doc("decides the order of prompts and every sample")] = 0


def trainer_of(student: Policy, teacher: Policy | RemoteTeacher, config: OnPolicy) -> Trainer:
    """The trainer with the loss of the settings."""
    train = TrainConfig(
        lr=config.lr,
        warmup=config.warmup,
        total_steps=config.steps,
        betas=(0.9, 0.95),
        micro_tokens=config.micro_tokens,
        dtype=config.dtype,
        temperature=config.temperature if config.loss == "policy" else 1.0,
        entropy=True,
        seed=config.seed,
    )
    if config.loss == "policy":
        # the first update after sampling: the ratio is 1 and clipping does nothing
        objective = policy_objective(importance_cap=config.importance_cap)
        return Trainer(student.model, train, objective, forward=token_forward)
    if not isinstance(teacher, Policy):
        raise UsageError("a divergence of whole distributions needs a model folder as the teacher; or --loss policy")
    forward = teacher_forward(
        teacher.model,
        beta=beta_of(config.loss, config.beta),
        temperature=config.softness,
        vocab_size=shared_entries(student, teacher),
    )
    return Trainer(student.model, train, distillation_objective(), forward=forward)


async def on_policy_loop(
    bench: Workbench,
    student: Policy,
    teacher: Policy | RemoteTeacher,
    tasks: Sequence[Task],
    config: OnPolicy,
    *,
    data_examples: Sequence[Example] = (),
) -> dict[str, float]:
    """Run the loop from the run's newest checkpoint to its last step; the student is tuned in place.

    Args:
        data_examples: completions of the data, for the steps that are not on-policy.

    Returns:
        The last step's metrics; `reverse_kl` is the mean over sampled tokens of log student − log teacher.
    """
    if config.on_policy < 1 and (not data_examples or config.loss == "policy"):
        raise UsageError("on_policy below 1 needs completions in the data and a divergence loss (not policy)")
    trainer = trainer_of(student, teacher, config)
    scorer = None
    if config.loss == "policy":
        settings = trainer.config
        scorer = Scorer(
            teacher, micro_tokens=settings.micro_tokens, dtype=settings.dtype, temperature=settings.temperature
        )
    schedule, ledger = PromptSchedule(tasks, config.seed, config.prompts_per_step), Ledger()
    resumed = load_latest(
        bench.run.checkpoints, trainer, ledger=ledger, report=lambda line: bench.run.event("warning", text=line)
    )
    bench.run.truncate_after(trainer.num_steps if resumed else -1)
    metrics = read_metrics(bench.run.path / "metrics.jsonl")[-1] if resumed else {}
    sampling = Sampling(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        n=config.samples,
        stop_tokens=tuple(sorted(student.renderer.stop_tokens)),
    )
    slots = min(config.slots, config.prompts_per_step * config.samples)
    engine = student.engine(
        slots=slots, length=student.length_for(tasks, config.max_tokens), seed=config.seed, inline=True
    )
    with engine, bench.progress("distill", config.steps, start=trainer.num_steps) as progress:
        for step in range(trainer.num_steps, config.steps):
            draw = generator(config.seed, "on_policy", step)
            if draw.random() >= config.on_policy:
                size = min(len(data_examples), config.prompts_per_step * config.samples)
                metrics = {**trainer.step(draw.sample(list(data_examples), size)), "on_policy": 0.0}
            else:
                engine.update_weights(student.model, version=step)
                chosen = schedule.tasks_at(step)
                groups = await run_groups(
                    engine, chosen, sampling, prompt_tokens=student.renderer.prompt, seed=config.seed, step=step
                )
                check_failures(groups, config.max_failed)
                if scorer is None:
                    advantages: list[list[Any]] = [[0.0] * len(group.trajectories) for group in groups]
                else:
                    advantages = list(await scorer.advantages(groups, config.advantage_clip))
                metrics = trainer.step(to_examples(groups, advantages))
                ledger.record([task.id for task in chosen], epoch=schedule.epoch(step))
                metrics |= rollout_metrics(groups) | {"on_policy": 1.0}
                if scorer is not None:
                    metrics["reverse_kl"] = mean_reverse_kl(groups, advantages)
            bench.run.tracker.log(metrics, step=step + 1)
            progress.advance({name: metrics[name] for name in SHOWN if name in metrics})
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                save_checkpoint(bench.run.checkpoints, trainer, ledger=ledger)
    return metrics


@recipe
def on_policy_distill(
    *,
    model: str,
    teacher: str,
    data: Path,
    teacher_model: str = "",
    loss: Literal["policy", "forward_kl", "reverse_kl", "jsd"] = "policy",
    beta: float = 0.5,
    softness: float = 1.0,
    on_policy: float = 1.0,
    columns: str | None = None,
    chat: bool = False,
    template: Path | None = None,
    limit: int | None = None,
    evaluation: tuple[Path, ...] = (),
    steps: int = 100,
    prompts_per_step: int = 16,
    samples: int = 4,
    max_tokens: int = 256,
    temperature: float = 1.0,
    advantage_clip: float | None = 10.0,
    lr: float = 1e-6,
    max_failed: float = 0.05,
    checkpoint_every: int = 20,
    kl_prompts: int = 16,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    name: str = "on-policy-distill",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """On-policy distillation: the student samples, a teacher judges every token.

    Args:
        model: folder of the student, or a Hugging Face name.
        teacher: folder or name of the teacher, of the student's vocabulary; for policy also an endpoint's address.
        data: prompts; with `--on-policy` below 1 prompts and completions.
        teacher_model: the endpoint's name of the teacher.
        loss: policy (advantages from the teacher's logprobs), or a divergence of the whole distributions.
        beta: of jsd: 0 is forward KL, 1 reverse KL.
        softness: temperature of both distributions in a divergence.
        on_policy: share of steps on the student's own samples; the others are on the data's completions.
        columns: which columns to read, as `prompt=question`.
        chat: make text prompts a user's turn of the chat template.
        template: a chat template file that replaces the student's own.
        limit: read at most this many rows.
        evaluation: files of evaluation tasks; rows that give one of them away are dropped, counted and kept in lineage.
        steps: optimiser steps.
        prompts_per_step: prompts per step.
        samples: answers per prompt.
        max_tokens: new tokens per answer.
        temperature: of the student's sampling.
        advantage_clip: bound on a token's advantage, in nats.
        lr: learning rate.
        max_failed: share of failed rollouts that stops the run.
        checkpoint_every: steps between checkpoints.
        kl_prompts: fixed prompts of the data on which the KL to the start is measured at the end; 0: none.
        dtype: of the trainer's matrix products.
        device: cpu, cuda, cuda:0 …
        seed: decides the order of prompts and every sample.
        name: of the tuned model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    options = dict(locals())
    with open_workbench("on_policy_distill", options, runs=runs, resume=resume) as bench:
        student = load_policy(model, device=device, template=template)
        master: Policy | RemoteTeacher
        if is_endpoint(teacher) and loss == "policy":
            master = RemoteTeacher(teacher, teacher_model, student)
        else:
            master = load_teacher(teacher, student, device=device)
        source = bench.registry.add_artifact(data, kind="dataset", name=data.name, storage="reference")
        kind: Literal["prompt", "completion"] = "completion" if on_policy < 1 else "prompt"
        loaded = rows.load(data, kind=kind, columns=columns, limit=limit, quarantine=bench.run.path / "bad_rows.jsonl")
        bench.say(loaded.report.summary())
        tasks = [rows.to_task(row, chat=chat) for row in loaded.rows]
        tasks = without_evaluation(bench, tasks, evaluation, source)
        if not tasks:
            raise DataError(f"{data}: no prompts")
        pairs = [row for row in loaded.rows if isinstance(row, CompletionRow)]
        longest = student.model.config.max_positions
        given = completion_examples(bench, student.renderer, pairs, longest, chat=chat) if pairs else []
        config = OnPolicy.from_dict({key: options[key] for key in OnPolicy.__struct_fields__ if key in options})
        metrics = asyncio.run(on_policy_loop(bench, student, master, tasks, config, data_examples=given))
        report_kl(bench, student, tasks, num_prompts=kl_prompts, max_tokens=max_tokens)
        tuned = student.save(bench.run.path / "model")
        bench.registry.add_run(bench.run)
        parents = [source.id]
        for path in [student.path, *([] if is_endpoint(teacher) else [resolve(teacher)])]:
            parents.append(bench.registry.add_artifact(path, kind="model", name=path.name, storage="reference").id)
        card = bench.registry.add_artifact(
            tuned, kind="model", name=name, parents=parents, run=bench.run.id, storage="reference"
        )
        left = metrics.get("reverse_kl", metrics.get("divergence", math.nan))
        bench.say(f"divergence of the last step {left:.4f} nats per token; model {card.short()} in {tuned}")
        return bench.run.path
