"""Follow one task through every room, really: runs the whole circle on a tiny model and writes `follow_one_task.md`.

    python docs/follow_one_task.py

Each door below is a function. The page shows its docstring, its source and the record that came out of it.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import math
import re
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import torch

from posttrain import data, evaluate, feedback, grade, objectives, registry, rollout, serve, train
from posttrain.core import (
    Checkpoint,
    Completion,
    EvalReport,
    Example,
    Feedback,
    Grade,
    Interaction,
    ModelCard,
    Sampling,
    Task,
    Trajectory,
    assistant,
)
from posttrain.engine import LocalEngine
from posttrain.recipes.policy import Policy
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.sft import completion_examples
from posttrain.recipes.supervised import Supervised, supervised_loop
from posttrain.recipes.workbench import open_workbench
from posttrain.render import Renderer

PAGE = Path(__file__).with_suffix(".md")
SUMS = [(a, b) for a, b in itertools.product(range(7), repeat=2) if a + b < 10]
NEW_TOKENS = 3
STEPS = 90  # of teaching: enough for some right answers, too few for all

INTRODUCTION = """# Follow one task

One question goes through every room and comes out as a row of the next training set. Everything on this page is what
`python docs/follow_one_task.py` did: at each door the call, and the record that came back, without empty fields and
with long lists cut short. The records are defined in `posttrain/core`; [the map](map.md) describes the rooms.

The policy is a decoder of {parameters:,} parameters with {vocabulary} tokens, made in seconds and taught some sums of
two digits, badly, so that there is something left to learn.
"""


def read_row(file: Path) -> data.PromptRow:
    """data: file → row. A line of a file becomes a typed row: the format is recognised by its columns, and a bad line
    would be counted and set aside. Here it is GSM8K's: a question, and a solution that ends in `#### 5`.
    """
    return data.load(file, kind="prompt").rows[0]


def make_task(row: data.PromptRow) -> Task:
    """data: row → Task. The prompt is what the policy sees. The answer is for graders alone; the written solution is
    kept among the facts. With `chat` the text becomes a user's turn.
    """
    return data.to_task(row, chat=True)


def render_prompt(renderer: Renderer, task: Task) -> tuple[int, ...]:
    """render: messages → tokens. The chat template gives the exact tokens to sample from. From here on they are never
    decoded and tokenised again; text is a view.
    """
    return renderer.prompt(task)


def sample(engine: LocalEngine, prompt: Sequence[int], stop_tokens: frozenset[int]) -> Completion:
    """engine: tokens → Completion. The sampler gives tokens for tokens, with the logprob of each under the
    distribution that it was drawn from and under the model itself, the version of the weights, and why it stopped.
    """
    sampling = Sampling(max_tokens=NEW_TOKENS, stop_tokens=tuple(stop_tokens), seed=7)
    return engine.generate([prompt], sampling)[0]


async def roll_out(engine: LocalEngine, renderer: Renderer, task: Task) -> rollout.Group:
    """rollout: Task → Trajectory. Eight siblings answer the same question. A trajectory is one token list, prompt and
    answer, with a mask of what the policy wrote. Shown is the first that is right, if one is. Its seed depends on
    the run's seed, the step and the task alone, so a run that is killed and resumed samples the same answers.
    """
    sampling = Sampling(max_tokens=NEW_TOKENS, n=8, stop_tokens=tuple(renderer.stop_tokens))
    (group,) = await rollout.run_groups(engine, [task], sampling, prompt_tokens=renderer.prompt, seed=0, step=0)
    rollout.check_failures([group])  # a rollout that fails is data; too many stop the run
    return group


async def grade_group(grader: grade.Number, group: rollout.Group) -> list[Grade]:
    """grade: Trajectory → Grade. The grader reads the last number of the answer. A grade has a score, or an error,
    never a silent 0. A grader proves itself first: gold answers score full marks, near misses do not.
    """
    grade.prove(grader).raise_for_problems()
    return await grade.grade_all(grader, group.trajectories)


def assign_credit(group: rollout.Group, grades: Sequence[Grade]) -> list[Example]:
    """objectives, rollout: Grade → Example. An answer's advantage is its score less the mean of its siblings'. The
    example carries it, and the sampler's logprobs, as columns beside the tokens: credit is assigned before the
    trainer.
    """
    rewards_PG = torch.tensor([[math.nan if each.score is None else each.score for each in grades]])
    advantages_PG = objectives.group_advantages(rewards_PG, std=False, valid_PG=~rewards_PG.isnan())
    return rollout.to_examples([group], advantages_PG.tolist())


def learn(trainer: train.Trainer, examples: Sequence[Example]) -> dict[str, float]:
    """train: Example → weights. One optimiser step. The trainer packs, computes the loss that it was given, clips and
    steps; it knows no algorithm by name. The metrics have TRL's names.
    """
    return trainer.step(examples)


def save(folder: Path, trainer: train.Trainer, ledger: train.Ledger, task: Task) -> Checkpoint:
    """train: weights → Checkpoint. Written beside, flushed, renamed: whole or absent. The ledger of what was trained
    lies in it, so that no prompt is skipped or repeated after a crash. Its digest covers every file.
    """
    ledger.record([task.id])
    return train.save_checkpoint(folder, trainer, ledger=ledger)


def evaluate_policy(policy: Policy, engine: LocalEngine, suite: evaluate.Suite, model: str) -> EvalReport:
    """evaluate: weights → EvalReport. Greedy answers to a suite, each with its grade. Every score has an interval, and
    the suite's hash says what may be compared with it.
    """
    return evaluate.run_suite_sync(suite, engine, policy.renderer.prompt, model=model)


def add_report(store: registry.Registry, model: str, report: EvalReport) -> ModelCard:
    """registry: EvalReport → ModelCard. The weights are an artifact named by the hash of their files; its parents say
    what it was made from. The card has the newest report's numbers.
    """
    store.add_report(report, model)
    return store.card(model)


def promote(store: registry.Registry, card: ModelCard) -> registry.Promotion:
    """registry: ModelCard → Promotion. The gate decides who is champion: enough tasks, no contamination, and, against
    a champion, a paired test. Refusals are kept too.
    """
    return store.promote("sums", card, gate=registry.Gate(min_samples=20), actor="docs", reason="the first model")


def ask(url: str, store: feedback.FeedbackStore, task: Task) -> Interaction:
    """serve: ModelCard → Interaction. The champion answers over an OpenAI-compatible API. What was served is on disk
    before the answer is sent: the exact tokens, their logprobs, and the card of the model that wrote them.
    """
    messages = [{"role": message.role, "content": message.content} for message in task.prompt]
    body = {"model": "sums", "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": "Bearer key"}, timeout=60)
    return store.interaction(answer.raise_for_status().json()["id"])


def correct(url: str, store: feedback.FeedbackStore, served: Interaction, right: str) -> Feedback:
    """feedback: Interaction → Feedback. Somebody corrects the answer, by the id that the client saw."""
    body = {"completion_id": served.id, "correction": right, "source": "reader"}
    answer = httpx.post(f"{url}/v1/feedback", json=body, headers={"Authorization": "Bearer key"}, timeout=60)
    answer.raise_for_status()
    return store.feedback_for(served.id)[0]


def export(store: feedback.FeedbackStore, file: Path) -> dict[str, Any]:
    """feedback: Feedback → data set. Signals become a data set of one of TRL's types, with where each row came from."""
    feedback.export(store, "prompt_completion", out=file)
    return json.loads(file.read_text())


def read_again(file: Path) -> Task:
    """data: data set → Task. The next recipe reads it: the same question, now with an answer that a person gave. The
    circle is closed, on disk.
    """
    return data.to_task(data.load(file, kind="completion").rows[0])


class Walk:
    """The page as it grows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[str] = []

    def say(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(text.strip() + "\n")

    def door(self, number: int, function: Callable[..., Any], record: object) -> None:
        """A heading, what the door does, its source, and what came out."""
        title, _, words = (inspect.getdoc(function) or "").partition(". ")
        self.say(f"## {number}. {title}")
        self.say(textwrap.fill(" ".join(words.split()), 120))
        self.say(f"```python\n{source_of(function)}\n```")
        self.say(f"```json\n{self.shown(record)}\n```")

    def shown(self, record: object) -> str:
        """The record as indented JSON, long lists cut short, fields that are empty left out."""
        text = msgspec.json.format(msgspec.json.encode(shortened(msgspec.to_builtins(record))), indent=2).decode()
        return re.sub(r"\[\s+((?:[^\[\]{}\"]|\"… \d+ more\")*?)\s+\]", _one_line, text).replace(str(self.folder), "…")

    def page(self) -> str:
        """All of it."""
        return "\n".join(self.parts)


def _one_line(match: re.Match[str]) -> str:
    return f"[{' '.join(match[1].split())}]"


def source_of(function: Callable[..., Any]) -> str:
    """Source without the docstring."""
    source = inspect.getsource(function)
    return re.sub(r'\n    """.*?"""', "", source, count=1, flags=re.DOTALL).strip()


def shortened(value: Any) -> Any:
    """The middle of long lists left out, numbers to six digits, empty fields left out."""
    if isinstance(value, Mapping):
        return {key: shortened(item) for key, item in value.items() if item not in (None, [], (), {}, "")}
    if isinstance(value, list | tuple):
        first, last = (1, 0) if value and isinstance(value[0], Mapping) else (4, 6)
        if len(value) <= first + last + 1:
            return [shortened(item) for item in value]
        ends = [*value[:first]], [*value[len(value) - last :]]
        return [*map(shortened, ends[0]), f"… {len(value) - first - last} more", *map(shortened, ends[1])]
    if isinstance(value, float):
        return round(value, 3) if abs(value) >= 1e6 else float(f"{value:.6g}")
    return value


def question(a: int, b: int) -> Task:
    """A sum as a task, as `make_task` makes it of a row."""
    return data.to_task(data.PromptRow(id=f"{a}+{b}", prompt=f"What is {a} + {b}?", answer=str(a + b)), chat=True)


def half_taught(folder: Path) -> tuple[Policy, Path]:
    """A tiny policy that was taught sums for a few steps, and the folder of that run."""
    texts = [f"What is {a} + {b}? {a + b}" for a, b in SUMS]
    policy = new_policy(
        texts, vocab_size=290, width=64, num_layers=2, num_heads=4, max_positions=64, seed=0, path=folder / "model"
    )
    with open_workbench("toy", {}, runs=folder / "runs") as bench:
        tasks = [question(a, b) for a, b in SUMS]
        pairs = [
            data.CompletionRow(id=task.id, prompt=task.prompt, completion=(assistant(str(task.answer)),))
            for task in tasks
        ]
        examples = completion_examples(bench, policy.renderer, pairs, 64)
        settings = Supervised(train=train.TrainConfig(lr=3e-3), batch_size=16, steps=STEPS)
        supervised_loop(bench, policy.model, examples, [], settings, title="sums")
        bench.registry.add_run(bench.run)
        return policy, bench.run.path


def walk(folder: Path) -> str:
    """Go once round; the page."""
    torch.set_num_threads(1)
    page = Walk(folder)
    file = folder / "sums.jsonl"
    file.write_text(
        "".join(
            json.dumps({"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}.\n#### {a + b}"}) + "\n"
            for a, b in sorted(SUMS, key=lambda pair: pair != (2, 3))
        )
    )
    policy, run = half_taught(folder)
    parameters = sum(weight.numel() for weight in policy.model.parameters())
    page.say(INTRODUCTION.format(parameters=parameters, vocabulary=policy.tokenizer.vocab_size))

    row = read_row(file)
    page.door(1, read_row, row)
    task = make_task(row)
    page.door(2, make_task, task)
    prompt = render_prompt(policy.renderer, task)
    page.door(3, render_prompt, {"tokens": prompt, "text": policy.tokenizer.decode(prompt, skip_special_tokens=False)})
    suite_sampling = Sampling(max_tokens=NEW_TOKENS, temperature=0, stop_tokens=tuple(policy.renderer.stop_tokens))
    grader = grade.Number()
    suite = evaluate.Suite(
        "sums", [data.to_task(each, chat=True) for each in data.load(file, kind="prompt")], suite_sampling, grader
    )
    with policy.engine(slots=32) as engine:
        page.door(4, sample, sample(engine, prompt, policy.renderer.stop_tokens))
        group = asyncio.run(roll_out(engine, policy.renderer, task))
        grades = asyncio.run(grade_group(grader, group))
        chosen = next((index for index, each in enumerate(grades) if each.score == 1), 0)
        trajectory: Trajectory = group.trajectories[chosen]
        page.door(5, roll_out, trajectory)
        page.door(6, grade_group, grades[chosen])
        page.say("The siblings' scores: " + ", ".join(f"{each.score:g}" for each in grades) + ".")
        examples = assign_credit(group, grades)
        page.door(7, assign_credit, next(each for each in examples if each.id == trajectory.id))
        trainer = train.Trainer(policy.model, train.TrainConfig(lr=1e-3), train.policy_objective())
        page.door(8, learn, learn(trainer, examples))
        page.door(9, save, save(run / "checkpoints-grpo", trainer, train.Ledger(), task))
        engine.update_weights(policy.model, version=1)
        after_the_step(page, folder, policy, engine, suite, run, task)
    return page.page()


def after_the_step(
    page: Walk, folder: Path, policy: Policy, engine: LocalEngine, suite: evaluate.Suite, run: Path, task: Task
) -> None:
    """The second half of the circle."""
    with (
        registry.Registry(folder / "runs" / "registry.db") as store,
        feedback.FeedbackStore(folder / "feedback.db") as heard,
    ):
        sums = store.add_artifact(folder / "sums.jsonl", kind="dataset", name="sums", meta={"contamination": {}})
        made = policy.save(folder / "model")
        model = store.add_artifact(made, kind="model", name="sums/grpo", parents=[sums.id], run=run.name).id
        report = evaluate_policy(policy, engine, suite, model)
        page.door(10, evaluate_policy, report)
        card = add_report(store, model, report)
        page.door(11, add_report, card)
        page.door(12, promote, promote(store, card))
        served = serve.ServedModel(name="sums", engine=engine, renderer=policy.renderer, card_id=card.id)
        with serve.Server(serve.create_app({"sums": served}, store=heard, api_keys=["key"])) as server:
            interaction = ask(server.url, heard, task)
            page.door(13, ask, interaction)
            page.door(14, correct, correct(server.url, heard, interaction, str(task.answer)))
    with feedback.FeedbackStore(folder / "feedback.db") as heard:
        page.door(15, export, export(heard, folder / "feedback.jsonl"))
    page.door(16, read_again, read_again(folder / "feedback.jsonl"))


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(walk(Path(folder).resolve()), encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
