"""Once round the flywheel, and a second time, on a laptop: a text-to-SQL assistant for a real database.

From nothing: a base model is made from the shop's documents; a few hundred question–query pairs teach it the form; GRPO
on questions without queries, rewarded by running the model's SQL on two databases, teaches it the rest. Each stage is
evaluated on the same held-out questions, promoted only through the gate, and the champion is served. Its users' thumbs
and corrections become the next training set.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain import data as rows
from posttrain.core import Task, UsageError, assistant, recipe
from posttrain.data import CompletionRow
from posttrain.evaluate import Stage, run_suite
from posttrain.feedback import FeedbackStore, export
from posttrain.models import quickest_dtype
from posttrain.recipes.grpo import Grpo, grpo_loop
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.pretrain import documents, new_policy
from posttrain.recipes.promotion import GATE, is_champion, promote
from posttrain.recipes.sft import completion_examples
from posttrain.recipes.shop.story import print_stages, write_report
from posttrain.recipes.shop.users import ask_and_judge, rows_of
from posttrain.recipes.shop.world import MAX_QUERY_TOKENS, SUITE, World, build_world, documents_of, suite_of, task_of
from posttrain.recipes.supervised import Supervised, split_held_out, steps_of, supervised_loop
from posttrain.recipes.workbench import RUNS, Workbench, open_stage, open_workbench
from posttrain.serve import ServedModel, Server, create_app
from posttrain.train import TrainConfig

PROJECT = "shop-sql"


@recipe
def flywheel(
    *,
    seed: int = 0,
    pretrain_steps: int = 1000,
    pairs: int = 230,
    sft_epochs: float = 7.0,
    questions: int = 5000,
    grpo_steps: int = 400,
    evaluation: int = 600,
    traffic: int = 400,
    project: str | None = None,
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """The whole circle on a laptop: a text-to-SQL assistant from nothing, promoted, served, and tuned on its users.

    Args:
        seed: decides the databases, the questions, the weights and every sample.
        pretrain_steps: steps of pre-training, 64 documents each.
        pairs: question–query pairs for SFT; deliberately few.
        sft_epochs: how often SFT sees each pair.
        questions: training questions without queries, for GRPO.
        grpo_steps: steps of 24 questions × 8 answers.
        evaluation: held-out questions.
        traffic: questions that users ask the served model.
        project: whose champion is promoted and served; without it every run has a project of its own.
        runs: folder of runs.
        resume: run folder to go on with.
    """
    options = dict(locals())
    if evaluation < GATE.min_samples:
        raise UsageError(f"--evaluation {evaluation}: the gate asks for {GATE.min_samples} questions at least")
    sizes = {"training": questions, "development": 150, "evaluation": evaluation, "traffic": traffic}
    with open_workbench("flywheel", options, runs=runs, resume=resume) as bench:
        world = build_world(bench.run.path / "shop", seed, **sizes)
        asyncio.run(_turn(bench, world, options))
        return bench.run.path


async def _turn(bench: Workbench, world: World, options: dict[str, Any]) -> None:
    seed, project = options["seed"], options["project"] or bench.run.id
    evaluated = [task_of(question) for question in world.evaluation]
    texts = clean(bench, "documents", documents_of(world, seed), evaluated)
    training = clean(bench, "training questions", [task_of(question) for question in world.training], evaluated)
    few = [
        CompletionRow(id=task.id, prompt=task.prompt, completion=(assistant(task.answer or ""),))
        for task in training[: options["pairs"]]
    ]

    base = await base_stage(bench, world, texts, options["pretrain_steps"], seed)
    sft = await sft_stage(bench, world, base, "sft", few, epochs=options["sft_epochs"], lr=4e-4, seed=seed)
    promote(bench, project, sft, [], "the first model that answers")
    grpo = await grpo_stage(bench, world, sft, training, options["grpo_steps"], seed)
    promote(bench, project, grpo, [sft], "GRPO on the results of execution")
    bench.say("the gate refuses what is not better; here the SFT model tries to replace its successor:")
    promote(bench, project, sft, [grpo], "shows a refusal")

    praised = await serve_and_listen(bench, world, project, evaluated, seed)
    champion = grpo if is_champion(bench, project, grpo) else sft
    second = await sft_stage(bench, world, champion, "second", [*praised, *few], epochs=2.0, lr=1e-4, seed=seed)
    promote(bench, project, second, [sft, grpo], "SFT on what users corrected and praised")

    stages = [base, sft, grpo, second]
    print_stages(stages)
    bench.say(f"report: {write_report(bench, project, stages)}")
    bench.say(f"serve the champion: posttrain serve --project {project} --runs {bench.run.path.parent}")


def clean(bench: Workbench, what: str, items: Sequence[Any], evaluated: Sequence[Task]) -> list[Any]:
    """Without the items that give an evaluation question away; says how many were dropped."""
    found = rows.check_contamination(items, {SUITE: evaluated})
    bench.say(
        f"contamination: {len(found.dropped)} of {len(items)} {what} dropped "
        f"(the whole text, or more than half of it in 8-grams, is in {len(evaluated)} held-out questions)"
    )
    kept = set(found.clean)
    return [item for item in items if (item[0] if isinstance(item, tuple) else item.id) in kept]


async def base_stage(
    bench: Workbench, world: World, named_texts: Sequence[tuple[str, str]], steps: int, seed: int
) -> Stage:
    """A tokenizer and a decoder from the shop's documents."""
    begun = time.monotonic()
    dataset = add_dataset(bench, world, "shop documents", named_texts)
    texts = [text for _, text in named_texts]
    with open_stage(bench, "base", {"seed": seed, "steps": steps, "data": dataset}) as stage:
        policy = new_policy(
            texts,
            vocab_size=1024,
            width=256,
            num_layers=4,
            num_heads=4,
            max_positions=512,
            seed=seed,
            path=stage.run.path / "model",
        )
        kept, apart = split_held_out(documents(policy.tokenizer, texts, 256), 200, seed)
        train = TrainConfig(
            lr=2e-3,
            schedule="cosine",
            warmup=40,
            total_steps=steps,
            weight_decay=0.01,
            betas=(0.9, 0.95),
            dtype=quickest_dtype(),
        )
        config = Supervised(train=train, batch_size=64, steps=steps, evaluate_every=max(1, steps // 10), seed=seed)
        summary = supervised_loop(stage, policy.model, kept, apart, config, title="base")
        policy.save(policy.path)
    return await evaluated_stage(bench, world, "base", policy, [dataset], summary["num_tokens"], begun)


async def sft_stage(
    bench: Workbench,
    world: World,
    parent: Stage,
    name: str,
    pairs: Sequence[CompletionRow],
    *,
    epochs: float,
    lr: float,
    seed: int,
) -> Stage:
    """Supervised fine-tuning of an earlier stage's model on question–query pairs."""
    begun = time.monotonic()
    policy = load_policy(bench.registry.card(parent.report.model).path)
    dataset = add_dataset(bench, world, f"{name} pairs", pairs)
    with open_stage(bench, name, {"seed": seed, "lr": lr, "epochs": epochs, "data": dataset}) as stage:
        examples = completion_examples(stage, policy.renderer, pairs, policy.model.config.max_positions)
        steps = steps_of(len(examples), 16, epochs)
        train = TrainConfig(
            lr=lr, schedule="cosine", warmup=10, total_steps=steps, betas=(0.9, 0.95), dtype=quickest_dtype()
        )
        config = Supervised(train=train, batch_size=16, steps=steps, seed=seed)
        summary = supervised_loop(stage, policy.model, examples, [], config, title=name)
        policy = replace(policy, path=stage.run.path / "model")
        policy.save(policy.path)
    return await evaluated_stage(
        bench, world, name, policy, [parent.report.model, dataset], summary["num_tokens"], begun
    )


async def grpo_stage(
    bench: Workbench, world: World, parent: Stage, tasks: Sequence[Task], steps: int, seed: int
) -> Stage:
    """GRPO on questions without queries: the policy sees the question, the grader alone the known answer."""
    begun = time.monotonic()
    policy = load_policy(bench.registry.card(parent.report.model).path)
    dataset = add_dataset(bench, world, "questions", tasks)
    config = Grpo(
        steps=steps,
        prompts_per_step=24,
        group_size=8,
        max_tokens=MAX_QUERY_TOKENS,
        lr=3e-4,
        schedule="linear",
        warmup=10,
        scale_rewards=True,
        evaluate_every=30,
        checkpoint_every=50,
        micro_tokens=4096,
        dtype=quickest_dtype(),
        sampler_dtype=quickest_dtype(),
        seed=seed,
    )
    with open_stage(bench, "grpo", {"seed": seed, "steps": steps, "data": dataset}) as stage:
        suite = suite_of("development", world.development, world, policy.renderer.stop_tokens)
        metrics = await grpo_loop(stage, policy, tasks, world.grader, config, held_out=suite)
        policy = replace(policy, path=stage.run.path / "model")
        policy.save(policy.path)
    return await evaluated_stage(
        bench, world, "grpo", policy, [parent.report.model, dataset], metrics["num_tokens"], begun
    )


def add_dataset(bench: Workbench, world: World, name: str, items: Sequence[Any]) -> str:
    """Register a data set with its measured overlap with the evaluation, which the gate reads; its id."""
    found = rows.check_contamination(items, {SUITE: [task_of(question) for question in world.evaluation]})
    meta = {"rows": len(items), "contamination": {SUITE: found.sets[SUITE].share}}
    content = b"\n".join(item[1].encode() if isinstance(item, tuple) else item.to_json() for item in items)
    return bench.registry.add_artifact(content, kind="dataset", name=name, meta=meta).id


async def evaluated_stage(
    bench: Workbench,
    world: World,
    name: str,
    policy: Policy,
    parents: Sequence[str],
    num_tokens: float,
    begun: float,
) -> Stage:
    """Register the stage's model and evaluate it on the held-out questions."""
    model = bench.registry.add_artifact(
        policy.path, kind="model", name=f"{PROJECT}/{name}", parents=parents, run=f"{bench.run.id}-{name}"
    )
    suite = suite_of(SUITE, world.evaluation, world, policy.renderer.stop_tokens)
    length = policy.length_for(suite.tasks, MAX_QUERY_TOKENS)
    with policy.engine(slots=256, length=length, inline=True) as engine:
        report = await run_suite(suite, engine, policy.renderer.prompt, model=model.id)
    bench.registry.add_report(report, model.id)
    seconds = time.monotonic() - begun
    score = report.metrics["accuracy"]
    bench.say(
        f"{name}: execution accuracy {score.value:.1%} [{score.low:.1%}, {score.high:.1%}] "
        f"on {score.n} held-out questions; {seconds:.0f} s"
    )
    return Stage(name=name, report=report, tokens=int(num_tokens), seconds=seconds)


async def serve_and_listen(
    bench: Workbench, world: World, project: str, evaluated: Sequence[Task], seed: int
) -> list[CompletionRow]:
    """Serve the champion, let the shop's staff use it, and make a training set of what they say.

    Returns:
        Prompt–completion rows: corrected answers and those that were praised, without any evaluation question.
    """
    card = bench.registry.champion(project)
    assert card is not None, "the first model was promoted before"
    policy = load_policy(card.path)
    key = secrets.token_urlsafe(24)  # another one after a resume: hence the scope of feedback below
    path = bench.run.path / "feedback.jsonl"
    with FeedbackStore(bench.run.path / "feedback.db") as store, policy.engine(slots=32) as engine:
        served = ServedModel(name=project, engine=engine, renderer=policy.renderer, card_id=card.id)
        with Server(create_app({project: served}, store=store, api_keys=[key], feedback_scope="all")) as server:
            visits = await ask_and_judge(
                server.url, key, project, world.traffic, world.grader, store, correction_share=0.7, seed=seed
            )
        right, corrected = sum(visit.right for visit in visits), sum(visit.corrected for visit in visits)
        bench.say(
            f"served {len(visits)} requests: {right} thumbs up, {len(visits) - right} down, {corrected} corrected"
        )
        written = export(store, "prompt_completion", out=path)
        for kind in ("preference", "unpaired_preference"):
            export(store, kind, out=bench.run.path / f"feedback_{kind}.jsonl")
    bench.say(f"feedback exported: {written.rows} rows in {path}")
    return clean(bench, "rows of feedback", rows_of(path), evaluated)
