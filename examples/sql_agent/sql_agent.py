"""An agent that works with databases, made from nothing: it asks, looks at what came back, and asks again.

    posttrain run examples/sql_agent/sql_agent.py --data DEFOG

DEFOG is a folder of defog-data's eleven databases as SQLite (NAME.sqlite.gz and NAME.sqlite.sql), with the questions
that people wrote about them (questions_gen_sqlite.jsonl …). The questions to learn from are made from the schemas: each
names a table and a value, and the agent has to find the column that holds it. A small model is shown a quarter of them,
solved carelessly; then GRPO over whole episodes rewards queries that give the right rows, on other questions without
queries. The same start is tuned with a single query for each question, until it has written as many tokens.
"""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

from databases import load_databases, tables
from questions import demonstration, human_questions, questions, shown, split

import posttrain as pt
from posttrain import rollout
from posttrain.core import Task, TokenSequence
from posttrain.grade import QueryLimits, QueryRunner, rows_match
from posttrain.models import Decoder, DecoderConfig
from posttrain.recipes.agent_loop import Agent, agent_loop, evaluate_episodes, stage_of
from posttrain.recipes.policy import Policy
from posttrain.recipes.rl_settings import Grpo
from posttrain.recipes.supervised import Supervised, supervised_loop
from posttrain.recipes.workbench import RUNS, Workbench, open_stage, open_workbench
from posttrain.render import Renderer, Tokenizer

TEMPLATE = (  # roles, contents, and calls as [query(sql="SELECT …")]; no list of tools: the agent has seen no others
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}({% for name in call.function.arguments %}"
    "{{ ', ' if not loop.first }}{{ name }}={{ call.function.arguments[name] | tojson }}{% endfor %})]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_CONTEXT = 512


class World:
    """The databases, and environments over them."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.databases = load_databases(source, folder)
        self.runner = QueryRunner(QueryLimits(timeout_s=0.5, max_rows=1000))

    def environment(self, *, single: bool = False) -> rollout.ToolEnvironment:
        """One episode: queries until the agent says that it is done; with `single`, one query."""
        newest: list[str] = []

        def tools(task: Task) -> rollout.environment_tools.Tools:
            run = partial(self.runner.run, self.databases[task.facts["database"]])

            def query(sql: str) -> rollout.ToolAnswer:
                """Run a SELECT query and see its first rows."""
                result = run(sql)
                if result.rows is None and not single:
                    raise rollout.ToolError(str(result.error)[:40])
                newest[:] = [sql]
                return rollout.ToolAnswer(text=shown(result.rows), done=single)

            return [rollout.FunctionTool(query, in_thread=False)]

        def judge(task: Task, messages: object) -> float:
            given = self.runner.run(self.databases[task.facts["database"]], newest[0]).rows if newest else None
            golds = [[tuple(row) for row in rows] for rows in task.facts["rows"]]
            return float(given is not None and any(rows_match(gold, given, ordered=False) for gold in golds))

        return rollout.ToolEnvironment(tools, judge=judge)


def new_agent(texts: list[str], path: Path, *, width: int, num_layers: int, vocab_size: int, seed: int) -> Policy:
    """A tokenizer of these texts and random weights: wide ones, with which a small model learns sooner to copy."""
    tokenizer = Tokenizer.train_bpe(texts, vocab_size, chat_template=TEMPLATE)
    config = DecoderConfig(
        family="qwen3",
        qk_norm="head",
        vocab_size=tokenizer.vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=width // 32,
        num_kv_heads=width // 32,
        head_dim=32,
        mlp_width=width * 2,
        max_positions=MAX_CONTEXT,
        tie_embeddings=True,
        eos_ids=tuple(sorted(tokenizer.eos_ids)),
        init_std=0.1,
    )
    return Policy(Decoder.random(config, seed=seed), tokenizer, Renderer(tokenizer), path)


def show(bench: Workbench, policy: Policy, world: World, tasks: list[Task], steps: int, seed: int) -> None:
    """SFT on careless demonstrations of these tasks, four of each."""
    talks = [demonstration(world.runner, world.databases, task, place, seed) for task in tasks for place in range(4)]
    examples = [
        pt.Example(id=str(place), sequences=(TokenSequence(tokens=each.tokens, mask=each.mask),))
        for place, each in enumerate(policy.renderer.render_many(talks))
        if len(each.tokens) <= MAX_CONTEXT
    ]
    with open_stage(bench, "sft", {"steps": steps, "seed": seed}) as stage:
        train = pt.train.TrainConfig(lr=2e-3, schedule="linear", warmup=20, total_steps=steps, dtype="bfloat16")
        config = Supervised(train=train, batch_size=32, steps=steps, seed=seed)
        supervised_loop(stage, policy.model, examples, [], config, title="sft")


def practise(
    bench: Workbench, policy: Policy, world: World, tasks: list[Task], config: Grpo, *, single: bool, max_sampled: float
) -> float:
    """GRPO of episodes; the tokens that the policy wrote."""
    name = "single" if single else "multi"
    with open_stage(bench, name, {**config.to_dict(), "max_sampled": max_sampled}) as stage:
        factory = partial(world.environment, single=single)
        limit = {"max_sampled": max_sampled} if single else {}
        found = asyncio.run(
            agent_loop(
                stage, policy, tasks, factory, rollout.EpisodeReward(), config, agent(single), title=name, **limit
            )
        )
        return found["num_tokens"]


def agent(single: bool) -> Agent:
    """Settings of the episodes."""
    return Agent(turn_tokens=96, limits=rollout.EpisodeLimits(max_turns=1 if single else 7, max_tokens=MAX_CONTEXT))


def measure(
    bench: Workbench, policy: Policy, world: World, tasks: list[Task], config: Grpo, name: str, *, single: bool
) -> dict[str, float]:
    """Held-out success, greedily, with its interval."""
    factory = partial(world.environment, single=single)
    with (stage := stage_of(policy, factory, rollout.EpisodeReward(), config, agent(single))).engine:
        found = asyncio.run(evaluate_episodes(stage, tasks))
    low, high = found["eval/success_low"], found["eval/success_high"]
    bench.say(
        f"{name}: {found['eval/success']:.1%} [{low:.1%}, {high:.1%}] of {len(tasks)}, "
        f"{found['eval/turns']:.1f} turns and {found['eval/tokens']:.0f} tokens each"
    )
    return found


@pt.recipe
def sql_agent(
    *,
    data: Path,
    sft_steps: int = 900,
    grpo_steps: int = 80,
    held_out: int = 400,
    width: int = 128,
    num_layers: int = 4,
    small: bool = False,
    seed: int = 0,
    runs: Path = RUNS,
) -> dict[str, float]:
    """Teach a small model to find its way in databases: SFT on careless demonstrations, then multi-turn GRPO.

    Args:
        data: folder of the databases and of the questions that people wrote.
        sft_steps: steps of SFT, 32 demonstrations each.
        grpo_steps: steps of GRPO, 24 questions × 8 episodes each.
        held_out: questions about values that were never seen, on which success is measured.
        width: of the decoder.
        num_layers: of the decoder.
        small: a run of seconds that only shows that everything fits together.
        seed: decides the questions, the weights and every sample.
        runs: folder of runs.
    """
    if small:
        sft_steps, grpo_steps, held_out, width, num_layers = 3, 2, 12, 64, 2
    options = {name: value for name, value in locals().items() if name not in ("data", "runs")}
    with open_workbench("sql_agent", {**options, "data": data}, runs=runs) as bench:
        world = World(data, bench.run.path / "databases")
        shown_tasks, practice, apart = split(questions(world.runner, world.databases, per_value=3, seed=seed), seed)
        apart, people = apart[:held_out], human_questions(world.runner, world.databases, data)
        bench.say(
            f"{len(shown_tasks)} questions with demonstrations, {len(practice)} without queries, "
            f"{len(apart)} held out; {len(people)} by people"
        )
        names = [
            name for path in world.databases.values() for table, own in tables(path).items() for name in (table, *own)
        ]
        asked = [task.prompt_text() for task in (*shown_tasks, *practice)]
        calls = ["user assistant tool [query(sql=\"SELECT count(*) FROM WHERE = '')] done no rows"] * 400
        shape = {"width": width, "num_layers": num_layers, "vocab_size": 1536}
        start = new_agent([*names * 3, *asked, *calls], bench.run.path / "model", **shape, seed=seed)
        show(bench, start, world, shown_tasks, sft_steps, seed)
        config = Grpo(
            steps=grpo_steps,
            prompts_per_step=4 if small else 24,
            group_size=4 if small else 8,
            max_tokens=MAX_CONTEXT,
            lr=2e-4,
            warmup=5,
            evaluate_every=0,
            kl_every=0,
            seed=seed,
        )
        rows = partial(measure, bench, world=world, tasks=apart, config=config)
        before = rows(policy=start, name="before RL, several turns", single=False)
        before_single = rows(policy=start, name="before RL, one query", single=True)
        multi, single = start, replace(start, model=copy.deepcopy(start.model))
        sampled = practise(bench, multi, world, practice, config, single=False, max_sampled=0.0)
        longer = config.replace(steps=grpo_steps * 8)
        sampled_single = practise(bench, single, world, practice, longer, single=True, max_sampled=sampled)
        after = rows(policy=multi, name="after RL, several turns", single=False)
        after_single = rows(policy=single, name="after RL with one query", single=True)
        bench.say(f"tokens written in RL: {sampled:,.0f} in several turns, {sampled_single:,.0f} with one query")
        human = measure(bench, multi, world, people, config, "questions by people", single=False)
        multi.save(multi.path)
        found = {"before": before, "before_single": before_single, "after": after, "after_single": after_single}
        found["people"] = human
        return {
            f"{name}{part}": each[f"eval/success{part}"]
            for name, each in found.items()
            for part in ("", "_low", "_high")
        }
