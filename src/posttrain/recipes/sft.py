"""Supervised fine-tuning: prompts and completions in, a tuned model out.

The loss is the negative log-likelihood of what the assistant wrote (its end-of-turn token included), normalised over
the whole step, so that accumulation and packing change nothing. All weights learn, or those above a frozen prefix, or
adapters. Left out on purpose: everything that a batch of rows and an optimiser do not need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from posttrain import data as rows
from posttrain import models
from posttrain.core import DataError, Example, RenderError, Task, TokenSequence, UsageError, recipe
from posttrain.data import CompletionRow
from posttrain.recipes.adapters import Lora, add_parents, save_tuned, tuned_part
from posttrain.recipes.decontaminate import without_evaluation
from posttrain.recipes.kl_report import report_kl
from posttrain.recipes.policy import load_policy
from posttrain.recipes.supervised import Supervised, split_held_out, steps_of, supervised_loop
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench
from posttrain.render import Renderer
from posttrain.train import SupervisedNormalise, TrainConfig


@recipe
def sft(
    *,
    model: str,
    data: Path,
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
    weight_decay: float = 0.0,
    normalise: SupervisedNormalise = "token",
    neftune_alpha: float = 0.0,
    kl_prompts: int = 16,
    freeze_layers: int = 0,
    adapter: Path | None = None,
    lora_rank: int = 0,
    lora_alpha: float = 32.0,
    lora_targets: tuple[str, ...] = (),
    lora_dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    four_bit: bool = False,
    max_length: int = 2048,
    micro_tokens: int = 8192,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    name: str = "sft",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Supervised fine-tuning on prompts and completions.

    Learning rate, schedule, warm-up and epochs default to Tülu 3's for 8B (arXiv 2411.15124); a small model made from
    nothing wants 1e-4 to 1e-3.

    Args:
        model: folder of the model to tune, or a Hugging Face name; or a folder of adapters, which go on learning.
        data: rows with prompts and completions: JSONL, parquet, CSV, a saved `datasets` folder; TRL, Alpaca, ShareGPT.
        columns: which columns to read, as `prompt=question,completion=answer`.
        chat: wrap plain text prompts and completions as a user's and an assistant's turn of the chat template.
        template: a chat template file that replaces the model's own.
        limit: read at most this many rows.
        held_out: examples kept apart to measure the loss on.
        evaluation: files of evaluation tasks; rows that give one of them away are dropped, counted and kept in lineage.
        epochs: how often each example is seen.
        batch_size: examples per optimiser step.
        lr: peak learning rate; not given: 5e-6, with adapters ten times that.
        schedule: course of the learning rate after warm-up.
        warmup: fraction of the steps.
        weight_decay: of matrices.
        normalise: token (mean over target tokens), sequence (mean over answers of each one's mean), or sum.
        neftune_alpha: noise on the embeddings while training (NEFTune), 5 to 15; 0: none.
        kl_prompts: fixed prompts of the data on which the KL to the start is measured at the end; 0: none.
        freeze_layers: freeze the embedding and so many of the first layers; 0: freeze nothing.
        adapter: a folder of adapters in PEFT's format to put on the model and go on with.
        lora_rank: train adapters (LoRA) of this rank; 0: train all weights.
        lora_alpha: adapters count alpha / rank.
        lora_targets: projections to adapt, as q_proj,v_proj; not given: all.
        lora_dropout: of the adapters' input.
        rslora: adapters count alpha / sqrt(rank).
        dora: adapters learn norms apart from directions (DoRA).
        four_bit: pack the base into 4 bits (QLoRA); needs the extra `quantised`.
        max_length: longer examples are left out and counted, tokens.
        micro_tokens: tokens per packed micro-batch.
        dtype: of matrix products; master weights are float32.
        device: cpu, cuda, cuda:0 …
        seed: decides order and the held-out examples.
        name: of the tuned model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    options = dict(locals())
    with open_workbench("sft", options, runs=runs, resume=resume) as bench:
        return run_sft(bench, options)


def run_sft(bench: Workbench, options: Mapping[str, Any]) -> Path:
    """The recipe's work in a run that is open: its own, or a stage of a longer recipe.

    Args:
        bench: the run.
        options: those of `sft`, all of them, by name.

    Returns:
        The run's folder; the model is in its `model`, registered as `options["name"]`.
    """
    policy = load_policy(
        options["model"], device=options["device"], template=options["template"], adapter=options["adapter"]
    )
    parents = add_parents(bench, policy, options["model"])
    lora = Lora.of(options)
    policy = tuned_part(policy, lora, seed=options["seed"])
    if options["freeze_layers"]:
        models.freeze_layers(policy.model, options["freeze_layers"])
    data: Path = options["data"]
    source = bench.registry.add_artifact(data, kind="dataset", name=data.name, storage="reference")
    loaded = rows.load(
        data,
        kind="completion",
        columns=options["columns"],
        limit=options["limit"],
        quarantine=bench.run.path / "bad_rows.jsonl",
    )
    bench.say(loaded.report.summary())
    pairs = [row for row in loaded.rows if isinstance(row, CompletionRow)]
    pairs = without_evaluation(bench, pairs, options["evaluation"], source)
    longest = min(options["max_length"], policy.model.config.max_positions)
    examples = completion_examples(bench, policy.renderer, pairs, longest, chat=options["chat"])
    kept, apart = split_held_out(examples, options["held_out"], options["seed"])
    steps = steps_of(len(kept), options["batch_size"], options["epochs"])
    config = Supervised(
        train=TrainConfig(
            lr=lora.lr(options["lr"], 5e-6),
            schedule=options["schedule"],
            warmup=options["warmup"],
            weight_decay=options["weight_decay"],
            total_steps=steps,
            micro_tokens=options["micro_tokens"],
            dtype=options["dtype"],
            seed=options["seed"],
        ),
        batch_size=options["batch_size"],
        steps=steps,
        evaluate_every=max(1, steps // 10),
        seed=options["seed"],
        normalise=options["normalise"],
        neftune_alpha=options["neftune_alpha"],
    )
    summary = supervised_loop(bench, policy.model, kept, apart, config, title="sft")
    report_kl(bench, policy, [*kept, *apart], num_prompts=options["kl_prompts"], seed=options["seed"])
    tuned = save_tuned(policy, bench.run.path / "model")
    bench.registry.add_run(bench.run)
    card = bench.registry.add_artifact(
        tuned, kind="model", name=options["name"], parents=[source.id, *parents], run=bench.run.id, storage="reference"
    )
    if apart:
        bench.say(
            f"held-out loss {summary['nll_before']:.4f} → {summary['nll_after']:.4f} nats per token "
            f"on {len(apart)} examples"
        )
    bench.say(f"model {card.short()} in {tuned}")
    return bench.run.path


def completion_examples(
    bench: Workbench, renderer: Renderer, pairs: Sequence[CompletionRow], max_length: int, *, chat: bool = False
) -> list[Example]:
    """Token sequences with the loss mask of what the assistant wrote.

    Rows that the chat template refuses and rows longer than `max_length` tokens are left out, counted and logged.

    Raises:
        DataError: more than 5 % of the rows are refused, or none is left.
        UsageError: the rows are conversations and the model has no chat template.
    """
    examples: list[Example] = []
    refused: list[str] = []
    too_long = 0
    for row in pairs:
        row = rows.as_chat(row) if chat else row
        try:
            rendered = renderer.completion_pair(Task(id=row.id, prompt=row.prompt, tools=row.tools), row.completion)
        except RenderError as error:
            refused.append(f"{row.id}: {error}")
            continue
        if len(rendered.tokens) > max_length:
            too_long += 1
            continue
        sequence = TokenSequence(tokens=rendered.tokens, mask=rendered.mask)
        examples.append(Example(id=row.id, sequences=(sequence,)))
    if refused:
        bench.run.event("refused_rows", count=len(refused), first=refused[:5])
    if too_long:
        bench.say(f"{too_long} of {len(pairs)} rows are longer than {max_length} tokens and left out")
    if refused and len(refused) == len(pairs):
        raise UsageError(f"the chat template refuses every row; first: {refused[0]}")
    if len(refused) > 0.05 * len(pairs) or not examples:
        raise DataError(
            f"{len(refused)} of {len(pairs)} rows refused by the chat template, {too_long} too long, "
            f"{len(examples)} left. First refusals: {'; '.join(refused[:3])}"
        )
    return examples
