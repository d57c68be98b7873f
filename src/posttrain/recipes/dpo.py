"""Preference optimisation on pairs: DPO and every relative of it that takes a chosen and a rejected answer.

The reference is where training starts: its logprobs are computed once and kept (`reference_cache`), or come from the
model without its adapters; SimPO, CPO, ORPO and SLiC need none. Then pairs are stepped through, each once an epoch.
`--loss` chooses the method and with it the settings that its source published (`preference_methods`); options that are
given outweigh them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from posttrain.core import Example, recipe
from posttrain.objectives import Divergence
from posttrain.recipes.adapters import Lora
from posttrain.recipes.kl_report import report_kl
from posttrain.recipes.policy import Policy
from posttrain.recipes.preference_loop import Measured, measure_pairs, preference_loop, say_ranking
from posttrain.recipes.preference_methods import Method, method_named
from posttrain.recipes.preference_rendering import pair_examples
from posttrain.recipes.preference_run import check_reference, get_ready, keep_tuned, load_pairs
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench
from posttrain.train import collision_forward, token_forward, with_step_scalars


@recipe
def dpo(
    *,
    model: str,
    data: Path,
    loss: str = "sigmoid",
    beta: float | None = None,
    lr: float | None = None,
    label_smoothing: float | None = None,
    gamma: float | None = None,
    nll_coef: float | None = None,
    divergence: Divergence = "reverse_kl",
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
    name: str = "dpo",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Preference optimisation on pairs: DPO, IPO, SimPO, ORPO and others.

    Args:
        model: folder of the model to tune, or a Hugging Face name.
        data: pairs with chosen and rejected answers, in any of the known formats.
        loss: sigmoid (DPO), sigmoid_norm, rpo, ipo, hinge, slic, robust, cdpo, exo_pair, nca_pair, bco_pair, apo_zero,
            apo_down, sppo_hard, aot, aot_unpaired, discopop, wpo, simpo, cpo, orpo, mpo.
        beta: strength of the pull to the reference; of IPO τ, of ORPO λ. None takes the method's published one.
        lr: peak learning rate, linear schedule. None takes the method's published one (for models of billions), with
            adapters ten times that.
        label_smoothing: assumed share of flipped preferences (sigmoid, cdpo, robust, exo_pair …).
        gamma: the margin of SimPO (γ) and SLiC (δ).
        nll_coef: weight of the chosen answer's negative log-likelihood.
        divergence: what keeps the policy near the reference (f-DPO).
        reference: cached (logprobs of the starting weights, computed once), or adapters-off (needs lora_rank).
        lora_rank: rank of adapters; 0 tunes all weights.
        kl_prompts: fixed prompts of the data on which the KL to the start is measured at the end; 0: none.
        columns: which columns to read, as `prompt=question,chosen=better,rejected=worse`.
        chat: wrap plain text prompts and answers as turns of the chat template.
        template: a chat template file that replaces the model's own.
        limit: read at most this many rows.
        held_out: pairs kept apart to measure on.
        evaluation: files of evaluation tasks; rows that give one of them away are dropped, counted and kept in lineage.
        epochs: how often each pair is seen.
        batch_size: pairs per optimiser step.
        warmup: fraction of the steps.
        max_length: pairs with a longer side are left out and counted, tokens.
        micro_tokens: tokens per packed micro-batch.
        dtype: of matrix products; master weights are float32.
        device: cpu, cuda, cuda:0 …
        seed: decides order and the held-out pairs.
        name: of the tuned model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    options = dict(locals())
    _method(options).objective(divergence)
    check_reference(options)
    with open_workbench("dpo", options, runs=runs, resume=resume) as bench:
        return run_dpo(bench, options)


def _method(options: Mapping[str, Any]) -> Method:
    given = {key: options[key] for key in ("beta", "label_smoothing", "gamma", "nll_coef")}
    method = method_named(options["loss"])
    lr = Lora.of(options).lr(options["lr"], method.lr)
    return replace(method, lr=lr, **{key: value for key, value in given.items() if value is not None})


def run_dpo(bench: Workbench, options: Mapping[str, Any]) -> Path:
    """The recipe's work in a run that is open: its own, or a stage of a longer recipe.

    Args:
        bench: the run.
        options: those of `dpo`, all of them, by name.

    Returns:
        The run's folder; the tuned model is in its `model`, registered as `options["name"]`.
    """
    method = _method(options)
    objective = method.objective(options["divergence"])
    check_reference(options)

    def make(policy: Policy, longest: int) -> list[Example]:
        return pair_examples(
            bench,
            policy.renderer,
            load_pairs(bench, options),
            longest,
            chat=options["chat"],
            mask_format=method.mask_format,
            nll_over_prompt=method.nll_over_prompt,
        )

    ready = get_ready(
        bench,
        options,
        objective=objective,
        lr=method.lr,
        mode=options["reference"] if method.reference else "none",
        make=make,
        forward=collision_forward if method.pair_weights == "wpo" else token_forward,
    )
    trainer, reference = ready.trainer, ready.reference
    bench.say(f"{options['loss']}: beta {method.beta:g}, lr {method.lr:g}, {ready.loop.steps} steps ({method.source})")
    pairs, held_out = (reference.before_training(part) for part in (ready.examples, ready.held_out))

    def measure() -> Measured:
        return measure_pairs(trainer, reference.at_step(held_out), beta=method.beta, per_token=method.per_token)

    summary = preference_loop(
        bench,
        trainer,
        pairs,
        ready.loop,
        prepare=lambda step: with_step_scalars(reference.at_step(step)),
        measure=measure if held_out else None,
        title="dpo",
    )
    parts = [*ready.examples, *ready.held_out]
    report_kl(bench, ready.policy, parts, num_prompts=options["kl_prompts"], seed=options["seed"])
    keep_tuned(bench, options, ready.policy, ready.data_id)
    say_ranking(bench, summary)
    return bench.run.path
