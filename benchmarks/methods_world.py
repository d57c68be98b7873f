"""A world in which every method can be tried in seconds: short strings to sort or to flip, with known answers.

A question is a rule and four different letters, "Scebd="; its answer is "bcde" (S sorts, D sorts downwards, F flips).
The start of all methods is a decoder of two layers, pre-trained on a corpus that is often wrong: it follows another
rule than the question's, or has two letters in the wrong order. So the model can do everything, and does not prefer
what is right. The teacher went on with right answers. Methods get other questions
than the corpus had, and no letters of a held-out question, in whatever order, occur in either.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from posttrain.core import Example, Sampling, Task, TokenSequence, derive_seed
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.pretrain import new_policy
from posttrain.rollout import run_groups
from posttrain.train import TrainConfig, Trainer, nll_objective

LETTERS, LENGTH, MAX_TOKENS = "abcdefgh", 4, 7
RULES: dict[str, Callable[[str], str]] = {
    "S": lambda letters: "".join(sorted(letters)),
    "F": lambda letters: letters[::-1],
    "D": lambda letters: "".join(sorted(letters, reverse=True)),
}
OTHER_RULE = {"S": ("D", 0.3), "F": ("S", 0.6), "D": ("F", 0.6)}  # which rule the corpus follows instead, how often
NUM_CORPUS, START_STEPS, TEACHER_STEPS = 2400, 2000, 300
SWAPPED = 0.2  # how often two neighbours are in the wrong order


class World(NamedTuple):
    """Folders, files and tasks that methods and evaluation take."""

    folder: Path
    start: Path  # the model all methods begin with
    teacher: Path
    train: list[Task]
    held_out: list[Task]

    def file(self, name: str) -> str:
        """Path of a data file: prompts, gold, documents, pairs, lesser_pairs, labels, steps."""
        return str(self.folder / f"{name}.jsonl")


def questions(num_train: int, num_held_out: int, seed: int) -> tuple[list[Task], list[Task]]:
    """Training and held-out tasks; the two share no set of letters."""
    draw = random.Random(seed)
    sets = list(itertools.combinations(LETTERS, LENGTH))
    draw.shuffle(sets)
    apart = len(sets) // 4

    def tasks(kind: str, of: Sequence[tuple[str, ...]], num: int) -> list[Task]:
        found: dict[str, Task] = {}
        while len(found) < num:
            letters = list(draw.choice(of))
            draw.shuffle(letters)
            rule, word = draw.choice(sorted(RULES)), "".join(letters)
            prompt = f"{rule}{word}="
            if prompt in found:
                continue
            found[prompt] = Task(id=f"{kind}-{len(found)}", prompt=prompt, answer=RULES[rule](word), tags=(rule,))
        return list(found.values())

    return tasks("train", sets[apart:], num_train), tasks("held-out", sets[:apart], num_held_out)


def corpus(tasks: Sequence[Task], seed: int) -> list[Task]:
    """The questions with answers as the start of all methods has seen them, right and wrong."""
    draw = random.Random(seed)
    written = []
    for task in tasks:
        rule, letters = task.tags[0], task.prompt_text()[1:-1]
        other, often = OTHER_RULE[rule]
        answer = RULES[other if draw.random() < often else rule](letters)
        if draw.random() < SWAPPED:
            at = draw.randrange(LENGTH - 1)
            answer = answer[:at] + answer[at + 1] + answer[at] + answer[at + 2 :]
        written.append(task.replace(answer=answer))
    return written


def gold(policy: Policy, tasks: Sequence[Task]) -> list[Example]:
    """The answers to imitate."""
    examples = []
    for task in tasks:
        rendered = policy.renderer.completion_pair(task.prompt, task.answer or "")
        examples.append(Example(id=task.id, sequences=(TokenSequence(tokens=rendered.tokens, mask=rendered.mask),)))
    return examples


def pretrained(path: Path, tasks: Sequence[Task], *, steps: int, seed: int, begin: Policy | None = None) -> Policy:
    """A decoder trained on the answers, of 2 layers and 64 numbers, for so many steps of 64 answers."""
    policy = begin or new_policy(
        [task.prompt_text() for task in tasks],
        vocab_size=259,
        width=64,
        num_layers=2,
        num_heads=4,
        max_positions=64,
        seed=seed,
        path=path,
    )
    examples, draw = gold(policy, tasks), random.Random(seed)
    config = TrainConfig(lr=3e-3, warmup=20, schedule="linear", total_steps=steps, betas=(0.9, 0.95), seed=seed)
    trainer = Trainer(policy.model, config, nll_objective)
    for _ in range(steps):
        trainer.step(draw.sample(examples, min(64, len(examples))))
    policy.save(path)
    return load_policy(str(path))


async def answered(policy: Policy, tasks: Sequence[Task], samples: int, seed: int) -> list[tuple[Task, list[str]]]:
    """What a policy answers when it is asked several times: from this, offline data is made."""
    stops = tuple(sorted(policy.renderer.stop_tokens))
    sampling = Sampling(max_tokens=MAX_TOKENS, n=samples, stop_tokens=stops)
    with policy.engine(slots=256, length=64, inline=True) as engine:
        groups = await run_groups(
            engine, tasks, sampling, prompt_tokens=policy.renderer.prompt, seed=derive_seed(seed, "answered")
        )
    return [(group.task, [trajectory.text for trajectory in group.trajectories]) for group in groups]


def offline_rows(asked: Sequence[tuple[Task, list[str]]]) -> dict[str, list[dict[str, object]]]:
    """Rows for offline methods from a policy's own answers: right and wrong in pairs, labels, labelled letters."""
    pairs: list[dict[str, object]] = []
    labels: list[dict[str, object]] = []
    steps: list[dict[str, object]] = []
    for task, texts in asked:
        answer = task.answer or ""
        right = sorted({text.strip() for text in texts if text.strip() == answer})
        wrong = sorted({text.strip() for text in texts if text.strip() and text.strip() != answer})
        if right and wrong:
            pairs.append({"prompt": task.prompt, "chosen": right[0], "rejected": wrong[0]})
        for text in (*right[:1], *wrong[:1]) if right and wrong else ():
            labels.append({"prompt": task.prompt, "completion": text, "label": text == answer})
            each = [text[place : place + 1] == answer[place : place + 1] for place in range(len(text))]
            steps.append({"prompt": task.prompt, "completions": list(text), "labels": each})
    return {"pairs": pairs, "labels": labels, "steps": steps}


def lesser_pairs(asked: Sequence[tuple[Task, list[str]]]) -> list[dict[str, object]]:
    """Pairs of which both are wrong, for a method that takes it that the model can do better than what is chosen.

    One is the commonest wrong answer to the prompt, the other the commonest of those with more or fewer letters in
    their places; the nearer of the two is chosen.
    """
    found: list[dict[str, object]] = []
    for task, texts in asked:
        answer = task.answer or ""
        counts = Counter(text.strip() for text in texts if text.strip() and text.strip() != answer)
        near = {text: sum(one == other for one, other in zip(text, answer, strict=False)) for text in counts}
        common = sorted(counts, key=lambda text: (-counts[text], text))
        others = [text for text in common if near[text] != near[common[0]]]
        if others:
            chosen, rejected = sorted((common[0], others[0]), key=lambda text: -near[text])
            found.append({"prompt": task.prompt, "chosen": chosen, "rejected": rejected})
    return found


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_world(folder: Path, *, seed: int, num_train: int = 800, num_held_out: int = 600) -> World:
    """Start, teacher and every data file, made from the seed alone; found again where the folder has them."""
    known, held_out = questions(NUM_CORPUS + num_train, num_held_out, seed)
    read, train = known[:NUM_CORPUS], known[NUM_CORPUS:]
    world = World(folder, folder / "start", folder / "teacher", train, held_out)
    done = folder / "done-5"  # a world with other files has another number
    if done.exists():
        return world
    folder.mkdir(parents=True, exist_ok=True)
    start = pretrained(world.start, corpus(read, seed), steps=START_STEPS, seed=seed)
    rows = offline_rows(asyncio.run(answered(start, train, 24, seed))) | {
        "lesser_pairs": lesser_pairs(asyncio.run(answered(start, train, 32, seed))),
        "prompts": [{"prompt": task.prompt, "answer": task.answer} for task in train],
        "gold": [{"prompt": task.prompt, "completion": task.answer} for task in train[:256]],
        "documents": [{"text": f"{task.prompt}{task.answer}"} for task in read],
    }
    for name, lines in rows.items():
        write_rows(folder / f"{name}.jsonl", lines)
    pretrained(world.teacher, read, steps=TEACHER_STEPS, seed=seed + 1, begin=start)
    done.write_text("")
    return world
