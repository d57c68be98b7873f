"""A whole post-training in seconds: a tiny model, made from nothing, learns to write as many words as it is asked for.

    posttrain run examples/word_count.py

SFT shows it 64 answers, half of them with a wrong number of words; GRPO then rewards the right number, by a grader of
your own: any function from a trajectory to a number.
"""

import asyncio
from pathlib import Path

import posttrain as pt
from posttrain.core import generator, read_metrics
from posttrain.data import CompletionRow
from posttrain.recipes.grpo import Grpo, grpo_loop
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.sft import completion_examples
from posttrain.recipes.supervised import Supervised, supervised_loop
from posttrain.recipes.workbench import RUNS, open_stage, open_workbench

WORDS = "ant bee cat dog elk fox gnu hen".split()


def counts_words(trajectory: pt.Trajectory) -> float:
    """1 for as many words as were asked for, all of them known; else 0."""
    answer = pt.grade.answer_text(trajectory).split()
    return float(len(answer) == trajectory.task.facts["count"] and set(answer) <= set(WORDS))


def task_of(count: int, name: str = "") -> pt.Task:
    """A request for so many words."""
    return pt.Task(id=f"{count}{name}", prompt=f"{count} words:", facts={"count": count})


def shown_pair(place: int, seed: int) -> CompletionRow:
    """A request with an answer; every second answer has any number of words."""
    random = generator(seed, "pair", place)
    asked = random.randint(1, 5)
    words = random.choices(WORDS, k=random.randint(1, 5) if place % 2 else asked)
    return CompletionRow(id=str(place), prompt=task_of(asked).prompt, completion="".join(f" {word}" for word in words))


@pt.recipe
def word_count(*, seed: int = 0, sft_steps: int = 120, grpo_steps: int = 40, runs: Path = RUNS) -> dict[str, float]:
    """Teach a tiny model to count words: SFT on answers of which half are wrong, then GRPO.

    Args:
        seed: decides the weights, the data and every sample.
        sft_steps: steps of SFT, 16 pairs each.
        grpo_steps: steps of GRPO, 10 requests × 8 answers each.
        runs: folder of runs.
    """
    cases = [pt.grade.right(task_of(2), "cat dog"), pt.grade.wrong(task_of(2), "cat")]
    grader = pt.grade.Function(counts_words, cases=cases)
    pt.grade.prove(grader).raise_for_problems()
    options = {"seed": seed, "sft_steps": sft_steps, "grpo_steps": grpo_steps}
    with open_workbench("word_count", options, runs=runs) as bench:
        pairs = [shown_pair(place, seed) for place in range(64)]
        shape = {"vocab_size": 280, "width": 64, "num_layers": 2, "num_heads": 4, "max_positions": 64}
        texts = [f"{pair.prompt}{pair.completion}" for pair in pairs]
        policy = new_policy(texts, **shape, seed=seed, path=bench.run.path / "model")
        with open_stage(bench, "sft", options) as stage:
            train = pt.train.TrainConfig(lr=3e-3, schedule="cosine", warmup=5, total_steps=sft_steps)
            config = Supervised(train=train, batch_size=16, steps=sft_steps, seed=seed)
            supervised_loop(
                stage, policy.model, completion_examples(stage, policy.renderer, pairs, 64), [], config, title="sft"
            )
        tasks = [task_of(count, name) for count in range(1, 6) for name in "ab"]
        settings = Grpo(
            steps=grpo_steps, prompts_per_step=10, group_size=8, max_tokens=16, lr=1e-3, dtype="float32", seed=seed
        )
        asyncio.run(grpo_loop(bench, policy, tasks, grader, settings))
        rewards = [row["reward"] for row in read_metrics(bench.run.path / "metrics.jsonl")]
        bench.say(f"mean reward: {rewards[0]:.2f} after SFT, {rewards[-1]:.2f} after GRPO")
        bench.say(f"sample from it: posttrain generate --model {policy.save(policy.path)} --prompt '3 words:'")
        return {"after_sft": rewards[0], "after_grpo": rewards[-1]}
