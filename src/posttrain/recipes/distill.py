"""Distillation from a fixed set of answers: the student imitates a teacher's answers, its probabilities, or both.

    --answers teacher --loss nll         sequence level: SFT on what the teacher writes (Kim & Rush, arXiv 1606.07947);
                                         the teacher may be an endpoint, and of another vocabulary
    --answers data --loss forward_kl     token level: the teacher's distribution at every token of given answers
    --answers teacher --loss forward_kl  both: its distribution on its own answers
    --answers teacher --loss … --top-k 20  the same from its likeliest tokens, which an endpoint tells too

The student never sees its own mistakes here; `on_policy_distill` is for that.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

from posttrain import data as rows
from posttrain.core import Sampling, UsageError, recipe
from posttrain.data import CompletionRow
from posttrain.models import resolve
from posttrain.recipes.adapters import Lora, add_parents, save_tuned, tuned_part
from posttrain.recipes.decontaminate import without_evaluation
from posttrain.recipes.grading import grader_from
from posttrain.recipes.kl_report import report_kl
from posttrain.recipes.policy import load_policy
from posttrain.recipes.sft import completion_examples
from posttrain.recipes.supervised import Supervised, split_held_out, steps_of, supervised_loop
from posttrain.recipes.teacher_answers import answer_examples, ask, only_right
from posttrain.recipes.teachers import is_endpoint, load_teacher, shared_entries
from posttrain.recipes.workbench import RUNS, open_workbench
from posttrain.train import (
    TrainConfig,
    Trainer,
    distillation_objective,
    nll_objective,
    teacher_forward,
    token_forward,
    top_k_forward,
)

Loss = Literal["nll", "forward_kl", "reverse_kl", "jsd"]


def beta_of(loss: Loss, beta: float) -> float:
    """The generalised divergence's beta: 0 for forward KL, 1 for reverse KL, `beta` for Jensen–Shannon."""
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "nll": 0.0, "jsd": beta}[loss]


@recipe
def distill(
    *,
    model: str,
    teacher: str,
    data: Path,
    teacher_model: str = "",
    answers: Literal["teacher", "data"] = "teacher",
    loss: Loss = "nll",
    top_k: int = 0,
    beta: float = 0.5,
    softness: float = 1.0,
    nll_weight: float = 0.0,
    grader: str | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    max_tokens: int = 256,
    columns: str | None = None,
    chat: bool = False,
    template: Path | None = None,
    limit: int | None = None,
    held_out: int = 64,
    evaluation: tuple[Path, ...] = (),
    epochs: float = 2.0,
    batch_size: int = 32,
    lr: float | None = None,
    schedule: Literal["linear", "cosine", "constant"] = "linear",
    warmup: float = 0.03,
    lora_rank: int = 0,
    lora_alpha: float = 32.0,
    lora_targets: tuple[str, ...] = (),
    kl_prompts: int = 16,
    max_length: int = 2048,
    micro_tokens: int = 8192,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    name: str = "distill",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Distillation: imitate a teacher's answers or its probabilities.

    Args:
        model: folder of the student, or a Hugging Face name.
        teacher: folder or name of the teacher, or the http address of an OpenAI-compatible endpoint.
        data: prompts, or with `--answers data` prompts and completions.
        teacher_model: the endpoint's name of the teacher.
        answers: whose answers are learned on: the teacher's own, or those of the data.
        loss: nll (the answers alone), forward_kl, reverse_kl or jsd to the teacher's distribution.
        top_k: learn from the teacher's so many likeliest tokens and a bucket for the rest; 0: from all of them.
        beta: of jsd: 0 is forward KL, 1 reverse KL.
        softness: temperature of both distributions in the divergence.
        nll_weight: share of the answers' likelihood in a divergence loss.
        grader: keep the teacher's answers that get full marks; needs reference answers.
        samples: answers of the teacher per prompt.
        temperature: of the teacher's sampling.
        max_tokens: new tokens per answer; answers cut there are left out.
        columns: which columns to read, as `prompt=question`.
        chat: make text prompts a user's turn of the chat template.
        template: a chat template file that replaces the student's own.
        limit: read at most this many rows.
        held_out: examples kept apart to measure the loss on.
        evaluation: files of evaluation tasks; rows that give one of them away are dropped, counted and kept in lineage.
        epochs: how often each example is seen.
        batch_size: examples per optimiser step.
        lr: peak learning rate; not given: 1e-5, with adapters ten times that.
        schedule: course of the learning rate after warm-up.
        warmup: fraction of the steps.
        lora_rank: train adapters (LoRA) of this rank; 0: train all weights.
        lora_alpha: adapters count alpha / rank.
        lora_targets: projections to adapt, as q_proj,v_proj; not given: all.
        kl_prompts: fixed prompts of the data on which the KL to the start is measured at the end; 0: none.
        max_length: longer examples are left out, tokens.
        micro_tokens: tokens per packed micro-batch.
        dtype: of matrix products; master weights are float32.
        device: cpu, cuda, cuda:0 …
        seed: decides the teacher's samples, the order and the held-out examples.
        name: of the tuned model in the registry.
        runs: folder of runs; the teacher's answers are kept in its `teacher_answers`.
        resume: run folder to go on with.
    """
    options = dict(locals())
    if answers == "data" and (loss == "nll" or top_k):
        raise UsageError("--answers data takes a divergence of the whole distribution: for its nll alone use sft")
    if top_k and loss == "nll":
        raise UsageError("--top-k needs a divergence: give --loss forward_kl, reverse_kl or jsd")
    with open_workbench("distill", options, runs=runs, resume=resume) as bench:
        student = load_policy(model, device=device, template=template)
        soft = loss != "nll" and not top_k
        master = load_teacher(teacher, student, device=device) if soft else None
        lora = Lora.of(options)
        source = bench.registry.add_artifact(data, kind="dataset", name=data.name, storage="reference")
        parents = [source.id, *add_parents(bench, student, model)]
        kind: Literal["completion", "prompt"] = "completion" if answers == "data" else "prompt"
        loaded = rows.load(data, kind=kind, columns=columns, limit=limit, quarantine=bench.run.path / "bad_rows.jsonl")
        bench.say(loaded.report.summary())
        given = without_evaluation(bench, list(loaded.rows), evaluation, source)
        longest = min(max_length, student.model.config.max_positions)
        if answers == "data":
            pairs = [row for row in given if isinstance(row, CompletionRow)]
            examples = completion_examples(bench, student.renderer, pairs, longest, chat=chat)
        else:
            tasks = [rows.to_task(row, chat=chat) for row in given]
            sampling = Sampling(
                max_tokens=max_tokens, temperature=temperature, n=samples, seed=seed, top_logprobs=top_k
            )
            found = ask(bench, tasks, sampling, teacher, student, master=master, endpoint_model=teacher_model)
            if grader is not None:
                found = asyncio.run(only_right(tasks, found, grader_from(grader)))
            examples = answer_examples(
                bench, student, tasks, found, top_k=top_k, exact=soft, max_length=longest, chat=chat
            )
        kept, apart = split_held_out(examples, held_out, seed)
        steps = steps_of(len(kept), batch_size, epochs)
        train = TrainConfig(
            lr=lora.lr(lr, 1e-5),
            schedule=schedule,
            warmup=warmup,
            total_steps=steps,
            micro_tokens=micro_tokens,
            dtype=dtype,
            seed=seed,
        )
        forward = token_forward
        if master is not None:
            forward = teacher_forward(
                master.model,
                beta=beta_of(loss, beta),
                temperature=softness,
                vocab_size=shared_entries(student, master),
            )
        elif top_k:
            forward = top_k_forward(top_k, beta=beta_of(loss, beta))
        objective = nll_objective if loss == "nll" else distillation_objective(nll_weight=nll_weight)
        student = tuned_part(student, lora, seed=seed)
        trainer = Trainer(student.model, train, objective, forward=forward)
        config = Supervised(train=train, batch_size=batch_size, steps=steps, seed=seed)
        summary = supervised_loop(bench, student.model, kept, apart, config, title="distill", trainer=trainer)
        report_kl(bench, student, [*kept, *apart], num_prompts=kl_prompts, seed=seed)
        tuned = save_tuned(student, bench.run.path / "model")
        bench.registry.add_run(bench.run)
        if not is_endpoint(teacher):
            folder = resolve(teacher)
            parents.append(bench.registry.add_artifact(folder, kind="model", name=teacher, storage="reference").id)
        card = bench.registry.add_artifact(
            tuned, kind="model", name=name, parents=parents, run=bench.run.id, storage="reference"
        )
        if "nll_after" in summary:
            bench.say(f"held-out loss {summary['nll_before']:.4f} → {summary['nll_after']:.4f} nats per token")
        bench.say(f"model {card.short()} in {tuned}")
        return bench.run.path
