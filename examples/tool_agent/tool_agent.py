"""An agent with a tool, made from nothing: it learns to open boxes until it has found the coin.

    posttrain run examples/tool_agent/tool_agent.py

One of six boxes holds a coin; the tool `open` tells what is in a box. SFT shows a tiny model how calls are written, by
demonstrations of somebody who soon loses patience and guesses; GRPO over whole episodes rewards the right box, and
nothing else.
"""

import asyncio
from pathlib import Path

import posttrain as pt
from posttrain import rollout
from posttrain.core import Message, TokenSequence, ToolCall, assistant, generator, user
from posttrain.recipes.agent_loop import Agent, agent_loop, evaluate_episodes, stage_of
from posttrain.recipes.policy import Policy
from posttrain.recipes.rl_settings import Grpo
from posttrain.recipes.supervised import Supervised, supervised_loop
from posttrain.recipes.workbench import RUNS, open_stage, open_workbench

BOXES = "abcdef"
TEMPLATE = (  # roles, contents, and calls as [open(box="a")]; no list of tools: the agent has seen no others
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}({% for name in call.function.arguments %}"
    "{{ ', ' if not loop.first }}{{ name }}={{ call.function.arguments[name] | tojson }}{% endfor %})]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["user\nWhere is it?", *(f'assistant\n[open(box="{box}")]' for box in BOXES), "tool\nnothing", "tool\ncoin"]


def task_of(place: int, seed: int, name: str) -> pt.Task:
    """A coin in one of the boxes."""
    return pt.Task(id=f"{name}-{place}", prompt="Where is it?", answer=generator(seed, name, place).choice(BOXES))


def environment() -> rollout.ToolEnvironment:
    """The tool, and the reward: 1 for the right box."""

    def tools(task: pt.Task) -> rollout.environment_tools.Tools:
        def open(box: str) -> str:
            """Say what a box holds."""
            return "coin" if box == task.answer else "nothing"

        return [rollout.FunctionTool(open, in_thread=False)]

    return rollout.ToolEnvironment(tools, judge=lambda task, messages: float(messages[-1].content == task.answer))


def demonstration(task: pt.Task, seed: int) -> list[Message]:
    """Boxes opened in any order until the coin is found, or patience ends; then the box is guessed."""
    random = generator(seed, "demonstration", task.id)
    messages = [user(task.prompt_text())]
    for box in random.sample(BOXES, len(BOXES)):
        if random.random() < 0.35:
            return [*messages, assistant(random.choice(BOXES))]
        messages.append(Message(role="assistant", tool_calls=(ToolCall(name="open", arguments={"box": box}),)))
        messages.append(Message(role="tool", content="coin" if box == task.answer else "nothing", name="open"))
        if box == task.answer:
            break
    return [*messages, assistant(box)]


def new_agent(path: Path, seed: int) -> Policy:
    """A tokenizer and random weights: wide ones, with which so small a model finds out sooner how to copy."""
    tokenizer = pt.render.Tokenizer.train_bpe(TEXTS * 20, 330, chat_template=TEMPLATE)
    config = pt.models.DecoderConfig(
        family="qwen3",
        qk_norm="head",
        vocab_size=tokenizer.vocab_size,
        width=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        mlp_width=128,
        max_positions=256,
        tie_embeddings=True,
        eos_ids=tuple(sorted(tokenizer.eos_ids)),
        init_std=0.15,
    )
    return Policy(pt.models.Decoder.random(config, seed=seed), tokenizer, pt.render.Renderer(tokenizer), path)


@pt.recipe
def tool_agent(
    *, seed: int = 0, sft_steps: int = 500, grpo_steps: int = 40, held_out: int = 200, runs: Path = RUNS
) -> dict[str, float]:
    """Teach a tiny model to use a tool: SFT on careless demonstrations, then GRPO over whole episodes.

    Args:
        seed: decides the weights, the data and every sample.
        sft_steps: steps of SFT, 32 demonstrations each.
        grpo_steps: steps of GRPO, 16 tasks × 8 episodes each.
        held_out: tasks that success is measured on, before and after.
        runs: folder of runs.
    """
    options = {"seed": seed, "sft_steps": sft_steps, "grpo_steps": grpo_steps, "held_out": held_out}
    with open_workbench("tool_agent", options, runs=runs) as bench:
        policy = new_agent(bench.run.path / "model", seed)
        shown = [demonstration(task_of(place, seed, "shown"), seed) for place in range(2000)]
        rendered = policy.renderer.render_many(shown)
        examples = [
            pt.Example(id=str(place), sequences=(TokenSequence(tokens=each.tokens, mask=each.mask),))
            for place, each in enumerate(rendered)
        ]
        with open_stage(bench, "sft", options) as stage:
            train = pt.train.TrainConfig(lr=3e-3, schedule="linear", warmup=10, total_steps=sft_steps, dtype="float32")
            config = Supervised(train=train, batch_size=32, steps=sft_steps, seed=seed)
            supervised_loop(stage, policy.model, examples, [], config, title="sft")
        limits = rollout.EpisodeLimits(max_turns=8, max_tokens=250)
        agent = Agent(turn_tokens=32, limits=limits)
        grpo = Grpo(
            steps=grpo_steps, prompts_per_step=16, group_size=8, max_tokens=250, lr=5e-4, dtype="float32", seed=seed
        )
        grader, apart = rollout.EpisodeReward(), [task_of(place, seed, "held out") for place in range(held_out)]

        async def success() -> dict[str, float]:
            with (playing := stage_of(policy, environment, grader, grpo, agent)).engine:
                return await evaluate_episodes(playing, apart, temperature=1.0)

        before = asyncio.run(success())
        tasks = [task_of(place, seed, "practice") for place in range(16 * grpo_steps)]
        asyncio.run(agent_loop(bench, policy, tasks, environment, grader, grpo, agent))
        after = asyncio.run(success())
        for name, found in (("before", before), ("after", after)):
            low, high = found["eval/success_low"], found["eval/success_high"]
            turns = found["eval/turns"]
            bench.say(f"{name} GRPO: {found['eval/success']:.1%} right [{low:.1%}, {high:.1%}], {turns:.1f} turns")
        policy.save(policy.path)
        return {
            "before": before["eval/success"],
            "after": after["eval/success"],
            "after_low": after["eval/success_low"],
        }
