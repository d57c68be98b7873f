"""Online DPO: sample answers from the policy, rank them with a grader, learn from the pairs, and again.

A round: a few prompts, G answers to each from the policy as it is; a grader scores them; the best and the worst answer
of a prompt become a pair, unless their scores are equal; a few steps of a preference loss on the round's pairs. The
reference is the model that the run started from, or with `--reference round` the policy at the beginning of the round
(iterated DPO, as Llama 3 and Iterative RPO train). Source: Guo et al., https://arxiv.org/abs/2402.04792.

Checkpoints are written between rounds. What a round samples depends on the seed and the round's number alone, so a run
that was killed repeats its unfinished round and gives the same weights.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from posttrain import data as rows
from posttrain.core import Config, Example, Grade, Grader, Sampling, Task, TokenSequence, doc, read_metrics, recipe
from posttrain.evaluate import Suite, run_suite
from posttrain.grade import WatchedGrader, reward_metrics, waits
from posttrain.recipes.decontaminate import without_evaluation
from posttrain.recipes.grading import grader_from
from posttrain.recipes.group_stream import graded_groups
from posttrain.recipes.kl_report import report_kl
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.preference_methods import Method, method_named
from posttrain.recipes.preference_run import keep_tuned
from posttrain.recipes.reference_cache import with_reference
from posttrain.recipes.supervised import batch_at, steps_of
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench
from posttrain.rollout import Group, PromptSchedule, rollout_metrics
from posttrain.rollout import check_failures as check_rollouts
from posttrain.train import (
    Ledger,
    TrainConfig,
    Trainer,
    collision_forward,
    load_latest,
    save_checkpoint,
    token_forward,
    with_step_scalars,
)


class OnlineDpo(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the loop."""

    rounds: Annotated[int, doc("rounds of sampling and learning", ge=1)]
    prompts_per_round: Annotated[int, doc("P, prompts per round", ge=1)]
    group_size: Annotated[int, doc("G, answers per prompt", ge=2)]
    max_tokens: Annotated[int, doc("new tokens per answer", ge=1)]
    batch_size: Annotated[int, doc("pairs per optimiser step", ge=1)]
    epochs: Annotated[float, doc("how often a round's pairs are seen", gt=0)] = 1.0
    temperature: Annotated[float, doc("of sampling", gt=0)] = 1.0
    reference: Annotated[Literal["start", "round"], doc("the run's first model, or each round's")] = "start"
    max_failed: Annotated[float, doc("share of failed rollouts or grades that stops the run")] = 0.05
    evaluate_every: Annotated[int, doc("rounds between evaluations on the held-out tasks; 0: never", ge=0)] = 5
    checkpoint_every: Annotated[int, doc("rounds between checkpoints", ge=1)] = 5
    micro_tokens: Annotated[int, doc("tokens per packed micro-batch", ge=1)] = 8192
    dtype: Annotated[Literal["float32", "bfloat16"], doc("of the trainer's matrix products")] = "bfloat16"
    slots: Annotated[int, doc("answers sampled at the same time", ge=1)] = 256
    seed: Annotated[int, doc("decides the order of prompts and every sample")] = 0


class Ranked(NamedTuple):
    """A round's pairs, and what became of its groups."""

    pairs: list[Example]
    metrics: dict[str, float]


def ranked_pairs(groups: Sequence[Group], grades: Sequence[Grade]) -> Ranked:
    """The best and the worst graded answer of each group, as the sampler's own tokens.

    Failed rollouts, failed grades and answers without a token take no part. Groups with fewer than two answers left, or
    whose best and worst score are equal, or whose best and worst answer are the same tokens, give no pair, and are
    counted: `pairs/{taken,failed,tied}`. Of equal scores the first sibling counts.
    """
    graded = iter(grades)
    pairs: list[Example] = []
    failed = tied = 0
    for group in groups:
        scored = []
        for trajectory in group.trajectories:
            score = next(graded).score
            if score is not None and not trajectory.failed() and any(trajectory.mask):
                scored.append((score, trajectory))
        if len(scored) < 2:
            failed += 1
            continue
        (high, best), (low, worst) = max(scored, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
        if high == low or best.tokens == worst.tokens:
            tied += 1
            continue
        sides = tuple(TokenSequence(tokens=side.tokens, mask=side.mask) for side in (best, worst))
        pairs.append(Example(id=group.id, sequences=sides, group=group.id))
    counts = {"pairs/taken": float(len(pairs)), "pairs/failed": float(failed), "pairs/tied": float(tied)}
    return Ranked(pairs, counts)


async def online_loop(
    bench: Workbench,
    policy: Policy,
    tasks: Sequence[Task],
    grader: Grader,
    method: Method,
    config: OnlineDpo,
    *,
    held_out: Suite | None = None,
) -> dict[str, float]:
    """Run the rounds from the run's newest checkpoint on; the policy is tuned in place.

    Returns:
        The last round's metrics.
    """
    schedule = PromptSchedule(tasks, config.seed, config.prompts_per_round)
    settings = TrainConfig(lr=method.lr, micro_tokens=config.micro_tokens, dtype=config.dtype, seed=config.seed)
    forward = collision_forward if method.pair_weights == "wpo" else token_forward
    objective = method.objective()
    first = Trainer(copy.deepcopy(policy.model), settings, objective) if config.reference == "start" else None
    trainer = Trainer(policy.model, settings, objective, forward=forward)
    ledger = Ledger()
    resumed = load_latest(
        bench.run.checkpoints, trainer, ledger=ledger, report=lambda line: bench.run.event("warning", text=line)
    )
    bench.run.truncate_after(int(resumed.extra["round"]) if resumed else -1)
    start = int(resumed.extra["round"]) if resumed else 0
    metrics: dict[str, float] = resumed.extra["metrics"] if resumed else {}
    past = read_metrics(bench.run.path / "metrics.jsonl") if resumed else []
    watched = WatchedGrader(grader, bench.run, step=start, max_failed=config.max_failed, past=past)
    await watched.prove()
    every = [*tasks, *(held_out.tasks if held_out else ())]
    slots = min(config.slots, config.prompts_per_round * config.group_size)
    engine = policy.engine(
        slots=slots, length=policy.length_for(every, config.max_tokens), seed=config.seed, inline=not waits(grader)
    )
    sampling = Sampling(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        n=config.group_size,
        stop_tokens=tuple(sorted(policy.renderer.stop_tokens)),
    )
    with engine, bench.progress("online_dpo", config.rounds, start=start) as progress:
        for place in range(start, config.rounds):
            engine.update_weights(policy.model, version=place)
            chosen = schedule.tasks_at(place)
            groups, grades = await graded_groups(
                engine, chosen, sampling, watched, prompt_tokens=policy.renderer.prompt, seed=config.seed, step=place
            )
            check_rollouts(groups, config.max_failed)
            watched.check(grades)
            trajectories = [trajectory for group in groups for trajectory in group.trajectories]
            pairs, metrics = ranked_pairs(groups, grades)
            metrics |= reward_metrics(grades, [trajectory.group for trajectory in trajectories])
            metrics |= rollout_metrics(groups) | learn(trainer, first or trainer, pairs, method, config, place)
            ledger.record([task.id for task in chosen], epoch=schedule.epoch(place))
            done = place + 1
            if held_out and config.evaluate_every and (done % config.evaluate_every == 0 or done == config.rounds):
                engine.update_weights(policy.model, version=done)
                report = await run_suite(held_out, engine, policy.renderer.prompt, model=f"round {done}")
                metrics["eval/accuracy"] = report.metrics["accuracy"].value
            metrics |= await watched.step(done, held_out=metrics.get("eval/accuracy"))
            bench.run.tracker.log(metrics, step=done)
            progress.advance({"reward": metrics["reward"], "pairs": metrics["pairs/taken"]})
            if done % config.checkpoint_every == 0 or done == config.rounds:
                save_checkpoint(
                    bench.run.checkpoints, trainer, ledger=ledger, extra={"round": done, "metrics": metrics}
                )
    return metrics


def learn(
    trainer: Trainer, reference: Trainer, pairs: Sequence[Example], method: Method, config: OnlineDpo, place: int
) -> dict[str, float]:
    """A round's steps on its pairs; without a pair there is none.

    Returns:
        The last step's metrics; `num_steps`, those taken since the beginning.
    """
    metrics: dict[str, float] = {}
    if pairs and method.reference:
        pairs = with_reference(pairs, reference.logprobs(pairs))
    for step in range(steps_of(len(pairs), config.batch_size, config.epochs) if pairs else 0):
        chosen = batch_at(len(pairs), config.batch_size, step, config.seed + place)
        metrics = trainer.step(with_step_scalars([pairs[index] for index in chosen]))
    return {**metrics, "num_steps": float(trainer.num_steps)}


@recipe
def online_dpo(
    *,
    model: str,
    data: Path,
    grader: str = "number",
    loss: str = "sigmoid",
    beta: float | None = None,
    lr: float | None = None,
    reference: Literal["start", "round"] = "start",
    rounds: int = 50,
    prompts_per_round: int = 32,
    group_size: int = 4,
    max_tokens: int = 256,
    batch_size: int = 32,
    epochs: float = 1.0,
    temperature: float = 1.0,
    kl_prompts: int = 16,
    columns: str | None = None,
    chat: bool = False,
    template: Path | None = None,
    limit: int | None = None,
    held_out: int = 0,
    evaluation: tuple[Path, ...] = (),
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    name: str = "online_dpo",
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Preference optimisation on the policy's own answers, ranked by a grader, in rounds.

    Args:
        model: folder of the policy, or a Hugging Face name.
        data: prompts with reference answers; GSM8K's question and answer columns are known.
        grader: exact, number, maths, sql:DATABASE[,DATABASE], or FILE.py:NAME.
        loss: a loss of the recipe dpo: sigmoid, ipo, simpo …
        beta: strength of the pull to the reference. None takes the method's published one.
        lr: learning rate, constant. None takes the method's published one (for models of billions).
        reference: start (the model that the run begins with) or round (the policy at the beginning of each round).
        rounds: rounds of sampling and learning.
        prompts_per_round: prompts per round.
        group_size: answers per prompt.
        max_tokens: new tokens per answer.
        batch_size: pairs per optimiser step.
        epochs: how often a round's pairs are seen.
        temperature: of sampling.
        kl_prompts: fixed prompts of the data on which the KL to the start is measured at the end; 0: none.
        columns: which columns to read, as `prompt=question,answer=solution`.
        chat: make text prompts a user's turn of the chat template.
        template: a chat template file that replaces the model's own.
        limit: read at most this many rows.
        evaluation: files of evaluation tasks; rows that give one of them away are dropped, counted and kept in lineage.
        held_out: tasks kept apart and evaluated greedily.
        dtype: of the trainer's matrix products.
        device: cpu, cuda, cuda:0 …
        seed: decides the order of prompts and every sample.
        name: of the tuned model in the registry.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    return _run(dict(locals()))


def _run(options: dict[str, Any]) -> Path:
    given = {key: options[key] for key in ("beta", "lr") if options[key] is not None}
    method = replace(method_named(options["loss"]), nll_over_prompt=False, mask_format=False, **given)
    config = OnlineDpo.from_dict({key: options[key] for key in OnlineDpo.__struct_fields__ if key in options})
    with open_workbench("online_dpo", options, runs=options["runs"], resume=options["resume"]) as bench:
        policy = load_policy(options["model"], device=options["device"], template=options["template"])
        judge = grader_from(options["grader"])
        data: Path = options["data"]
        source = bench.registry.add_artifact(data, kind="dataset", name=data.name, storage="reference")
        loaded = rows.load(
            data,
            kind="prompt",
            columns=options["columns"],
            limit=options["limit"],
            quarantine=bench.run.path / "bad_rows.jsonl",
        )
        bench.say(loaded.report.summary())
        tasks = [rows.to_task(row, chat=options["chat"]) for row in loaded.rows]
        tasks = without_evaluation(bench, tasks, options["evaluation"], source)
        apart, kept = tasks[: options["held_out"]], tasks[options["held_out"] :]
        stops = tuple(sorted(policy.renderer.stop_tokens))
        greedy = Sampling(max_tokens=config.max_tokens, temperature=0.0, stop_tokens=stops)
        suite = Suite("held-out", apart, greedy, judge) if apart else None
        metrics = asyncio.run(online_loop(bench, policy, kept, judge, method, config, held_out=suite))
        report_kl(bench, policy, kept, num_prompts=options["kl_prompts"], max_tokens=config.max_tokens)
        keep_tuned(bench, options, policy, source.id)
        bench.say(f"reward of the last round {metrics['reward']:.3f}")
        return bench.run.path
