"""The recipes that follow a paper, from end to end on a tiny world, resumed, and their lineage.

The world: "Sdba=" asks for three letters in order ("abd"), "Fdba=" for them backwards. The base model has read both
rules, but more often than not the answer in front of it was a mere copy of the question's letters; so what it says
when it says the likeliest is a copy, and right answers are among its samples. Some of what it read was in the tags of
reasoning. No letters of an evaluation task, in whatever order, were in what it read. One training row is an evaluation
task, word for word.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from posttrain.cli.run import find_recipe
from posttrain.core import Comparison, EvalReport, Example, TokenSequence, read_jsonl, read_metrics
from posttrain.data import CompletionRow, PreferenceRow
from posttrain.recipes import tulu3
from posttrain.recipes.paper_pairs import Rated
from posttrain.recipes.pretrain import new_policy
from posttrain.registry import Registry, RunFolder, folder_digest
from posttrain.train import TrainConfig, Trainer, nll_objective

pytestmark = pytest.mark.slow

LETTERS, STEPS, READ = "abcdefghij", 700, 8  # READ: how often a question stands there, each time answered anew
COPIED, TAGGED, FORMED = 0.65, 0.5, 0.35  # shares of what is read: copies, with "?", of these in the answer's tags
RULES: dict[str, Callable[[str], str]] = {"S": lambda word: "".join(sorted(word)), "F": lambda word: word[::-1]}
TAGS = "<think></think><answer></answer>"


class World(NamedTuple):
    """Folder of the base model, and files; those for R1-Zero have "?" before each prompt."""

    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"


def questions(sets: list[tuple[str, ...]]) -> list[tuple[str, str]]:
    """All prompts on these letters, with answers; none that a copy answers."""
    words = ["".join(word) for own in sets for word in itertools.permutations(own)]
    both = [(word, rule, RULES[rule](word)) for word in words for rule in RULES]
    return [(f"{rule}{word}=", answer) for word, rule, answer in both if answer != word]


def as_read(prompt: str, draw: random.Random) -> tuple[str, str]:
    """A prompt and an answer as the base model reads them: a copy more often than not; with "?" some are in tags."""
    word = prompt[1:-1]
    answer = word if draw.random() < COPIED else RULES[prompt[0]](word)
    if draw.random() >= TAGGED:
        return prompt, answer
    formed = draw.random() < FORMED
    return f"?{prompt}", f"<think>{word}</think>" + (f"<answer>{answer}</answer>" if formed else answer)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), int(os.environ.get("POSTTRAIN_TEST_WORLD", "0")))


def make_world(folder: Path, seed: int) -> World:
    """The base model and all files, from the seed alone.

    Its accuracy on `unseen` is 8 to 30 % (worlds 0 and 1; with tags 0 %), and each recipe lifts it by 44 points or
    more: rounding that differs on another processor makes another world, and has room to.
    """
    draw = random.Random(seed)
    sets = list(itertools.combinations(LETTERS, 3))
    draw.shuffle(sets)
    held_out, training = questions(sets[:16]), questions(sets[16:])
    for pairs in (held_out, training):
        draw.shuffle(pairs)
    policy = new_policy(
        [TAGS] * 4,
        vocab_size=290,
        width=64,
        num_layers=2,
        num_heads=4,
        max_positions=48,
        seed=seed,
        path=folder / "base",
    )
    examples = []
    for number, (prompt, _) in enumerate(training * READ):
        rendered = policy.renderer.completion_pair(*as_read(prompt, draw))
        examples.append(Example(id=str(number), sequences=(TokenSequence(tokens=rendered.tokens, mask=rendered.mask),)))
    config = TrainConfig(lr=3e-3, warmup=20, schedule="linear", total_steps=STEPS, betas=(0.9, 0.95))
    trainer = Trainer(policy.model, config, nll_objective)
    for _ in range(STEPS):
        trainer.step(draw.sample(examples, 48))
    policy.save(folder / "base")
    asked = [{"prompt": prompt, "answer": answer} for prompt, answer in training]
    tasks = [{"prompt": prompt, "answer": answer} for prompt, answer in held_out]
    leak = {"prompt": held_out[0][0], "completion": held_out[0][1]}
    good = [{"prompt": prompt, "completion": answer} for prompt, answer in training[:24]]
    write(folder / "sft.jsonl", [*good, leak])
    for name, rows in {"prompts": [*asked[24:], tasks[-1]], "dev": tasks[:40], "unseen": tasks[40:]}.items():
        write(folder / f"{name}.jsonl", rows)
        write(folder / f"{name}_tagged.jsonl", [{**row, "prompt": f"?{row['prompt']}"} for row in rows[-500:]])
    return World(folder)


def run(name: str, world: World, runs: Path, *, tagged: str = "", **options: Any) -> Path:
    """A recipe by its name, as the command line runs it."""
    files = {name: [world.file(name + tagged)] for name in ("prompts", "dev", "unseen")}
    given = {"model": world.folder / "base", "grader": "exact", "size": "tiny", "max_tokens": 24, "dtype": "float32"}
    values = {**given, **files, "runs": runs, **options}
    found: Path = find_recipe(name).run_with(json.loads(json.dumps(values, default=str)))
    return found


def main_run(runs: Path, name: str) -> Path:
    """The recipe's own run folder."""
    paths = [path.parent for path in runs.glob("*/run.json")]
    (found,) = [path for path in paths if RunFolder.open(path, read_only=True).state.recipe == name]
    return found


def stages(main: Path) -> dict[str, Path]:
    return {path.name.removeprefix(f"{main.name}-"): path for path in main.parent.glob(f"{main.name}-*")}


def last_test(main: Path, split: str) -> Comparison:
    """The last model against the first on a split."""
    return [one for one in read_jsonl(main / "comparisons.jsonl", Comparison) if one.suite == split][-1]


def traces(main: Path) -> dict[str, tuple[int, ...]]:
    """Of every stage how often it was opened again, and when its model and its metrics were last written."""
    found = {}
    for name, path in stages(main).items():
        files = [path / "metrics.jsonl", path / "model" / "model.safetensors"]
        times = [file.stat().st_mtime_ns for file in files if file.exists()]
        found[name] = (RunFolder.open(path, read_only=True).state.resumed, *times)
    return found


def made_from(main: Path, model: Path) -> tuple[set[str], dict[str, dict[str, Any]]]:
    """Upwards of a model: the hashes of the models it was made from, and the meta of the data sets by name."""
    with Registry(main.parent / "registry.db") as registry:
        nodes = registry.lineage(registry.add_artifact(model, kind="model", name="asked", storage="reference").id).nodes
    data = {node.name.partition("/")[2]: node.meta for node in nodes if node.kind == "dataset"}
    return {node.id for node in nodes if node.kind == "model"}, data


def check_better(main: Path) -> None:
    found = last_test(main, "unseen")
    assert found.better, found
    assert found.p_value < 0.01
    assert (main / "report.html").stat().st_size > 10_000


def test_tulu3(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    options: dict[str, Any] = {"data": world.file("sft"), "dpo_lr": [1e-4, 5e-4], "dpo_batch": 16, "rm_lr": 3e-3}
    options |= {"rl": "ppo", "rl_steps": 10}

    def interrupted(*args: Any, **given: Any) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tulu3, "reinforced", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("tulu3", world, runs, **options)
    main = main_run(runs, "tulu3")
    before = traces(main)
    assert set(before) == {"sft", "dpo-1", "dpo-2", "reward-model"}
    rated = (main / "data" / "rated.jsonl").stat().st_mtime_ns
    with Registry(runs / "registry.db") as registry:
        assert {report.suite for report in _reports(registry)} == {"dev"}, "unseen is asked at the end only"

    model = run("tulu3", world, runs, **options, resume=main)
    after = traces(main)
    assert {name: after[name] for name in before} == before, "what had finished was repeated"
    assert (main / "data" / "rated.jsonl").stat().st_mtime_ns == rated
    assert set(after) - set(before) == {"ppo"}
    check_better(main)

    said = capsys.readouterr().out
    assert "sft-data: 1 of 25 rows dropped" in said
    assert "best of 2 on dev: dpo-" in said
    assert "sft: finished before" in said
    pairs = read_jsonl(main / "data" / "pairs.jsonl", PreferenceRow)
    answers = {json.loads(line)["prompt"]: json.loads(line)["answer"] for line in world.file("prompts").open()}
    assert len(pairs) > 100
    assert all(pair.chosen == answers[str(pair.prompt)] != pair.rejected for pair in pairs)

    models, data = made_from(main, model)
    assert folder_digest(world.folder / "base") in models
    assert len(models) == 5  # base, SFT, the better DPO, the reward model, PPO
    assert set(data) == {"sft-data", "rl-data", "pairs"}
    assert [data[name]["dropped"] for name in ("sft-data", "rl-data", "pairs")] == [1, 1, 0]
    assert all(set(meta["contamination"].values()) == {0.0} for meta in data.values())


def test_llama3_rounds(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, people = tmp_path / "runs", tmp_path / "people.py"
    people.write_text(PEOPLE)
    options: dict[str, Any] = {"data": world.file("sft"), "rounds": 2, "samples": 6, "annotator": f"{people}:people"}
    options |= {"sft_lr": 2.5e-4, "sft_epochs": 1.0, "rm_lr": 2e-3, "rm_batch": 4, "dpo_lr": 1e-3, "dpo_batch": 16}
    model = run("llama3_rounds", world, runs, **options)
    main = main_run(runs, "llama3_rounds")
    check_better(main)
    said = capsys.readouterr().out
    assert "prompts: 1 of" in said
    rates = [line for line in said.splitlines() if line.startswith("Win rate of")]
    assert [line.partition(" on ")[0] for line in rates] == [
        "Win rate of round-1 over start",
        "Win rate of round-2 over round-1",
    ]
    parts = [{one.task.id for one in read_jsonl(main / "data" / f"rated-{n}.jsonl", Rated)} for n in (1, 2, 3)]
    assert sum(len(part) for part in parts) == len(set().union(*parts)), "every win rate is on fresh prompts"
    _check_average(stages(main))

    models, data = made_from(main, model)
    assert folder_digest(world.folder / "base") in models
    assert {"prompts", "written", "pairs-1", "pairs-2", "best-1", "best-2", "all-pairs-2"} <= set(data)
    assert data["prompts"]["dropped"] == data["written"]["dropped"] == 1

    before = traces(main)
    assert run("llama3_rounds", world, runs, **options, resume=main) == model
    assert traces(main) == before, "a finished run was repeated"
    assert rates == [line for line in capsys.readouterr().out.splitlines() if line.startswith("Win rate of")]


def test_r1_zero(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    options: dict[str, Any] = {"ask": "plain", "steps": 50, "prompts_per_step": 32, "lr": 4e-4}
    options |= {"later_stage": True, "samples": 4}
    model = run("r1_zero", world, runs, tagged="_tagged", **options)
    main = main_run(runs, "r1_zero")
    check_better(main)
    rows = read_metrics(stages(main)["zero"] / "metrics.jsonl")
    assert len(rows) == 50
    for name in ("reward", "rewards/accuracy/mean", "rewards/format/mean"):
        first, last = (sum(row[name] for row in part) / 5 for part in (rows[:5], rows[-5:]))
        assert last > first + 0.2, name
    assert all(row["completions/mean_length"] > 0 for row in rows)
    assert "Completion length" in (main / "report.html").read_text()
    kept = read_jsonl(main / "data" / "right-answers.jsonl", CompletionRow)
    answers = {json.loads(line)["prompt"]: json.loads(line)["answer"] for line in world.file("prompts_tagged").open()}
    assert len(kept) > 100
    for row in kept:
        assert str(row.completion).startswith("<think>")
        assert str(row.completion).endswith(f"</think><answer>{answers[str(row.prompt)]}</answer>")

    models, data = made_from(main, model)
    assert folder_digest(world.folder / "base") in models
    assert len(models) == 3  # base, R1-Zero whose answers it imitates, and itself
    assert data["questions"]["dropped"] == 1

    before = traces(main)
    assert run("r1_zero", world, runs, tagged="_tagged", **options, resume=main) == model
    assert traces(main) == before, "a finished run was repeated"
    assert "zero: finished before" in capsys.readouterr().out


PEOPLE = """
from posttrain.grade import Function

def letters_right(trajectory):
    answer = trajectory.task.answer
    return sum(ours == theirs for ours, theirs in zip(answer, trajectory.text.strip())) / len(answer)

people = Function(letters_right)
"""


def _check_average(found: dict[str, Path]) -> None:
    """A round's model is the mean of its DPO models, which differ."""
    made, one, two = (
        load_file(found[name] / "model" / "model.safetensors") for name in ("round-2", "dpo-2-1", "dpo-2-2")
    )
    assert any(not torch.equal(one[name], two[name]) for name in made)
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-6)


def _reports(registry: Registry) -> list[EvalReport]:
    return [report for artifact in registry.artifacts("model") for report in registry.reports(artifact.id)]
