"""An agent that works with databases, made from nothing: it asks, looks at what came back, and asks again.

    posttrain run examples/sql_agent/sql_agent.py --data DEFOG

DEFOG is a folder of defog-data's eleven databases as SQLite (NAME.sqlite.gz and NAME.sqlite.sql), with the questions
that people wrote about them (questions_gen_sqlite.jsonl …). README.md says what is measured and what came out.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from agent_world import TEMPLATE, World
from demonstrations import demonstration, documents
from questions import human_questions, questions, split

import posttrain as pt
from posttrain import rollout
from posttrain.core import Example, Message, Task, TokenSequence
from posttrain.models import Decoder, DecoderConfig, num_parameters, quickest_dtype
from posttrain.recipes.agent_loop import Agent, agent_loop, evaluate_episodes, stage_of
from posttrain.recipes.policy import Policy
from posttrain.recipes.rl_settings import Grpo
from posttrain.recipes.supervised import Supervised, supervised_loop
from posttrain.recipes.workbench import RUNS, Workbench, open_stage, open_workbench
from posttrain.render import Renderer, Tokenizer

MAX_CONTEXT = 512
FRAME = (  # what a tokenizer learns its words from; names and values stay letters, which are sooner compared
    "user assistant tool [query(sql=\"SELECT DISTINCT count(*) sum() FROM WHERE = ''\")] "
    '[schema(table="")] done no rows NULL Error how many total with of'
)
APART = ("restaurants", "yelp")  # databases that nothing is trained on


def new_agent(path: Path, *, width: int, num_layers: int, seed: int) -> Policy:
    """A tokenizer that knows the words of queries and spells all else, and random weights."""
    tokenizer = Tokenizer.train_bpe([FRAME] * 50, 340, chat_template=TEMPLATE)
    config = DecoderConfig(
        family="qwen3",
        qk_norm="head",
        vocab_size=tokenizer.vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=width // 32,
        num_kv_heads=width // 32,
        head_dim=32,
        mlp_width=width * 8 // 3 // 64 * 64,
        max_positions=MAX_CONTEXT,
        tie_embeddings=True,
        eos_ids=tuple(sorted(tokenizer.eos_ids)),
        init_std=0.1,
    )
    return Policy(Decoder.random(config, seed=seed), tokenizer, Renderer(tokenizer), path)


def imitate(
    bench: Workbench,
    policy: Policy,
    talks: Sequence[Sequence[Message]],
    name: str,
    *,
    lr: float,
    batch: int,
    steps: int,
) -> None:
    """Supervised training on what the assistant says in these conversations."""
    examples = [
        Example(id=str(place), sequences=(TokenSequence(tokens=each.tokens, mask=each.mask),))
        for place, each in enumerate(policy.renderer.render_many(talks))
        if len(each.tokens) <= MAX_CONTEXT
    ]
    with open_stage(bench, name, {"steps": steps, "lr": lr}) as stage:
        train = pt.train.TrainConfig(
            lr=lr, schedule="cosine", warmup=0.04, total_steps=steps, betas=(0.9, 0.95), dtype=quickest_dtype()
        )
        config = Supervised(train=train, batch_size=batch, steps=steps)
        supervised_loop(stage, policy.model, examples, [], config, title=name)


def practise(
    bench: Workbench, policy: Policy, world: World, tasks: list[Task], config: Grpo, *, single: bool, max_sampled: float
) -> float:
    """GRPO of episodes; the tokens that the policy wrote."""
    name = "single" if single else "multi"
    with open_stage(bench, name, {**config.to_dict(), "max_sampled": max_sampled}) as stage:
        factory = partial(world.environment, single=single)
        limit = {"max_sampled": max_sampled} if single else {}
        reward = rollout.EpisodeReward()
        loop = agent_loop(stage, policy, tasks, factory, reward, config, agent(single), title=name, **limit)
        return asyncio.run(loop)["num_tokens"]


def agent(single: bool) -> Agent:
    """Settings of the episodes."""
    return Agent(turn_tokens=80, limits=rollout.EpisodeLimits(max_turns=1 if single else 8, max_tokens=MAX_CONTEXT))


def measure(
    bench: Workbench, policy: Policy, world: World, tasks: list[Task], config: Grpo, name: str, *, single: bool
) -> dict[str, float]:
    """Success, greedily, with its interval."""
    factory = partial(world.environment, single=single)
    with (stage := stage_of(policy, factory, rollout.EpisodeReward(), config, agent(single))).engine:
        found = asyncio.run(evaluate_episodes(stage, tasks))
    low, high = found["eval/success_low"], found["eval/success_high"]
    bench.say(
        f"{name}: {found['eval/success']:.1%} [{low:.1%}, {high:.1%}] of {len(tasks)}, "
        f"{found['eval/turns']:.1f} turns and {found['eval/tokens']:.0f} tokens each"
    )
    return found


def vote(
    bench: Workbench, policy: Policy, world: World, tasks: list[Task], config: Grpo, name: str, tokens: float
) -> dict[str, float]:
    """Single queries, so many for each question that they have `tokens` tokens: by majority, and whether any is right.

    The majority is that of results, without empty ones (self-consistency, arXiv 2203.11171).
    """
    factory = partial(world.environment, single=True)
    with (stage := stage_of(policy, factory, rollout.EpisodeReward(), config, agent(True))).engine:
        play = partial(stage.play, temperature=1.0, step=0, max_failed=1.0)
        probe = asyncio.run(play(tasks[:50], siblings=1, seed=1))
        each = sum(one.group.trajectories[0].num_completion_tokens() for one in probe) / len(probe)
        siblings = max(1, round(tokens / each))
        rolled = asyncio.run(play(tasks, siblings=siblings, seed=2))
    right = hits = 0
    for one in rolled:
        queries = [sql for trajectory in one.group.trajectories if (sql := query_of(trajectory.messages)) is not None]
        results = Counter(found for sql in queries if (found := world.result(one.group.task, sql)) is not None)
        best = results.most_common(1)[0][0] if results else None
        chosen = next((sql for sql in queries if world.result(one.group.task, sql) == best), None)
        right += chosen is not None and world.right(one.group.task, chosen)
        hits += any(world.right(one.group.task, sql) for sql in queries)
    share, any_of = (pt.evaluate.wilson(count, len(tasks)) for count in (right, hits))
    bench.say(
        f"{name}: {share.value:.1%} [{share.low:.1%}, {share.high:.1%}] by the majority of {siblings} queries of "
        f"{each:.0f} tokens; any of them right {any_of.value:.1%} [{any_of.low:.1%}, {any_of.high:.1%}]"
    )
    return {"eval/success": share.value, "eval/success_low": share.low, "eval/success_high": share.high}


def query_of(messages: Sequence[Message]) -> str | None:
    """The query of an episode with a single one."""
    for message in messages:
        for call in message.tool_calls:
            if call.name == "query":
                return str(call.arguments.get("sql", ""))
    return None


@pt.recipe
def sql_agent(
    *,
    data: Path,
    base_steps: int = 1700,
    sft_steps: int = 80,
    grpo_steps: int = 60,
    held_out: int = 500,
    width: int = 192,
    num_layers: int = 4,
    small: bool = False,
    seed: int = 0,
    runs: Path = RUNS,
) -> dict[str, float]:
    """Teach a small model to find its way in databases: SFT on careless demonstrations, then multi-turn GRPO.

    Args:
        data: folder of the databases and of the questions that people wrote.
        base_steps: steps of the base model, 24 documents each.
        sft_steps: steps of SFT, 32 demonstrations each.
        grpo_steps: steps of GRPO, 32 questions × 8 episodes each.
        held_out: questions about values that were never seen, on which success is measured.
        width: of the decoder.
        num_layers: of the decoder.
        small: a run of seconds that only shows that everything fits together.
        seed: decides the questions, the weights and every sample.
        runs: folder of runs.
    """
    if small:
        base_steps, sft_steps, grpo_steps, held_out, width, num_layers = 3, 3, 2, 12, 64, 2
    options = {name: value for name, value in locals().items() if name not in ("data", "runs")}
    with open_workbench("sql_agent", {**options, "data": data}, runs=runs) as bench:
        clock = Clock(bench)
        world = World(data, bench.run.path / "databases")
        made = questions(world.runner, world.databases, per_value=6, seed=seed)
        known = [task for task in made if task.facts["database"] not in APART]
        shown, practice, apart = split(known, seed)
        apart, people = apart[:held_out], human_questions(world.runner, world.databases, data)
        foreign = [task for task in made if task.facts["database"] in APART][:held_out]
        bench.say(
            f"{len(shown)} questions for demonstrations, {len(practice)} without queries, {len(apart)} held out, "
            f"{len(foreign)} about other databases; {len(people)} by people"
        )
        schemas = [
            (name, table, columns)
            for name, own in world.tables.items()
            if name not in APART
            for table, columns in own.items()
        ]
        cards = documents(schemas, sorted({task.facts["value"] for task in shown}), 12 * base_steps, seed)
        talks = [demonstration(world.ask, task, place, seed) for task in shown for place in range(2)]
        shape = {"width": width, "num_layers": num_layers}
        start = new_agent(bench.run.path / "model", **shape, seed=seed)
        bench.say(f"{num_parameters(start.model.config):,} parameters")
        imitate(bench, start, cards, "base", lr=3e-3, batch=24, steps=base_steps)
        clock.lap("base model")
        imitate(bench, start, talks, "sft", lr=7e-4, batch=32, steps=sft_steps)
        clock.lap("SFT")
        config = Grpo(
            steps=grpo_steps,
            prompts_per_step=4 if small else 32,
            group_size=4 if small else 8,
            max_tokens=MAX_CONTEXT,
            lr=2e-4,
            warmup=5,
            schedule="linear",
            scale_rewards=True,
            evaluate_every=0,
            checkpoint_every=1000,
            kl_every=0,
            dtype=quickest_dtype(),
            sampler_dtype=quickest_dtype(),
            seed=seed,
        )
        rows = partial(measure, bench, world=world, config=config)
        found = {
            "before": rows(policy=start, tasks=apart, name="before RL, several turns", single=False),
            "before_single": rows(policy=start, tasks=apart, name="before RL, one query", single=True),
        }
        multi, single = start, replace(start, model=copy.deepcopy(start.model))
        clock.lap("measurements before")
        sampled = practise(bench, multi, world, practice, config, single=False, max_sampled=0.0)
        clock.lap("GRPO of several turns")
        found["after"] = rows(policy=multi, tasks=apart, name="after RL, several turns", single=False)
        found["foreign"] = rows(policy=multi, tasks=foreign, name="databases never seen", single=False)
        found["people"] = rows(policy=multi, tasks=people, name="questions by people", single=False)
        multi.save(multi.path)
        clock.lap("measurements after")
        each = sampled / grpo_steps / config.prompts_per_step / config.group_size
        longer = config.replace(steps=round(1.1 * grpo_steps * each / found["before_single"]["eval/tokens"]) + 1)
        sampled_single = practise(bench, single, world, practice, longer, single=True, max_sampled=sampled)
        bench.say(f"tokens written in RL: {sampled:,.0f} in several turns, {sampled_single:,.0f} with one query")
        clock.lap("GRPO of one query")
        found["after_single"] = rows(policy=single, tasks=apart, name="after RL with one query", single=True)
        tokens = found["after"]["eval/tokens"]
        found["voted"] = vote(bench, single, world, apart, config, "as many tokens, one query at a time", tokens)
        clock.lap("measurements of one query")
        return {
            f"{name}{part}": one[f"eval/success{part}"] for name, one in found.items() for part in ("", "_low", "_high")
        }


class Clock:
    """Says how long each part took."""

    def __init__(self, bench: Workbench) -> None:
        self.bench, self.begun = bench, time.monotonic()

    def lap(self, name: str) -> None:
        """A part is over."""
        now = time.monotonic()
        self.bench.say(f"[{name}: {now - self.begun:.0f} s]")
        self.begun = now
