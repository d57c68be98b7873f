"""What the recipes that follow a paper are made of: data, pairs, win rates, rule rewards, settings, stages."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from posttrain.core import Grade, Task, UsageError, assistant, user
from posttrain.data import CompletionRow
from posttrain.grade import Exact, PairwiseJudge, grade_all, prove, trajectory_from_text
from posttrain.recipes import r1_zero, tulu3
from posttrain.recipes.paper_data import ByFile, completions, keep_data, load_tasks, sources_of
from posttrain.recipes.paper_pairs import Asking, Rated, RatedAnswer, _rated, best_and_lower, win_rate
from posttrain.recipes.paper_rewards import INSTRUCTION, RightForm, TaggedAnswer, asked, rule_rewards
from posttrain.recipes.paper_settings import LLAMA3, R1, TULU3, settings_of
from posttrain.recipes.paper_stages import done_stage, options_of
from posttrain.recipes.ppo import Ppo
from posttrain.recipes.rl_settings import Grpo
from posttrain.recipes.sft import sft
from posttrain.recipes.workbench import Workbench, open_workbench
from posttrain.registry import RunFolder


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rated(name: str, *scores: tuple[str, str, float | None]) -> Rated:
    answers = tuple(RatedAnswer(model=model, text=text, score=score) for model, text, score in scores)
    return Rated(task=Task(id=name, prompt=f"{name}?"), answers=answers)


# Data


def test_files_of_one_name_are_told_apart_and_may_have_their_own_grader(tmp_path: Path) -> None:
    row: dict[str, object] = {"prompt": "1 + 1 =", "answer": "2"}
    one, two = (write(tmp_path / folder / "test.jsonl", [row]) for folder in ("gsm8k", "math"))
    found = sources_of([str(one), f"{two}=exact"], "number")
    assert [(source.label, source.grader) for source in found] == [("test", "number"), ("math-test", "exact")]
    tasks = load_tasks(found)
    assert [task.id for task in tasks] == ["test/test.jsonl:1", "math-test/test.jsonl:1"]
    assert [task.tags for task in tasks] == [("test",), ("math-test",)]
    with pytest.raises(UsageError, match="no such file"):
        sources_of([str(tmp_path / "absent.jsonl")], "number")
    with pytest.raises(UsageError, match="bear the same ids"):
        sources_of([str(one), str(one), str(one)], "number")


def test_each_task_is_graded_by_its_files_grader(tmp_path: Path) -> None:
    row: dict[str, object] = {"prompt": "1 + 1 =", "answer": "2"}
    paths = [write(tmp_path / f"{name}.jsonl", [row]) for name in ("sums", "words")]
    sources = sources_of([str(paths[0]), f"{paths[1]}=exact"], "number")
    grader = ByFile(sources)
    assert grader.name == "exact+number"
    answers = [trajectory_from_text(task, "it is 2") for task in load_tasks(sources)]
    grades = asyncio.run(grade_all(grader, answers))
    assert [grade.score for grade in grades] == [1.0, 0.0]  # the number is right, the text is not the answer
    assert [grades[0].parts["number"], grades[1].parts["exact"]] == [1.0, 0.0]
    assert {grade.grader for grade in grades} == {grader.name}


def test_rows_that_give_tasks_away_are_dropped_counted_and_not_read_again(bench: Workbench, tmp_path: Path) -> None:
    words = "how many eggs does the farmer sell on the market each day"
    held_out = [Task(id="t0", prompt="short?"), Task(id="t1", prompt=words)]
    source = write(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "short?", "completion": "yes"},
            {"prompt": "tell me", "completion": f"somebody asked {words} and so on"},
            {"prompt": "clean", "completion": "row"},
        ],
    )
    splits = {"dev": held_out[:1], "unseen": held_out[1:]}
    kept = keep_data(bench, "sft", CompletionRow, lambda: completions(source, False), splits, origin=[source])
    assert [row.prompt for row in kept.rows] == ["clean"]
    assert kept.num_dropped == 2
    meta = bench.registry.artifact(kept.id).meta
    assert meta["dropped"] == 2
    assert meta["dropped_for"] == {"dev": 1, "unseen": 1}
    assert meta["contamination"] == {"dev": 0.0, "unseen": 0.0}
    assert len(meta["origin"]["rows.jsonl"]) == 64

    def never() -> list[CompletionRow]:
        raise AssertionError("made again")

    again = keep_data(bench, "sft", CompletionRow, never, splits, origin=[source])
    assert (again.rows, again.id, again.num_dropped) == (kept.rows, kept.id, 2)


# Pairs


def test_the_best_answer_is_chosen_and_a_lower_one_rejected() -> None:
    alike = rated("alike", ("a", "x", 0.5), ("b", "y", 0.5))
    alone = rated("alone", ("a", "x", 0.5), ("b", "", None))
    many = rated("many", ("a", "best", 0.9), ("a", "worst", 0.1), ("b", "middling", 0.6), ("b", "cut", None))
    drawn = set()
    for seed in range(40):
        (pair,) = best_and_lower([alike, alone, many], seed=seed)
        assert (pair.id, pair.chosen) == ("many", "best")
        assert pair.margin == pytest.approx(0.8 if pair.rejected == "worst" else 0.3)
        drawn.add(pair.rejected)
    assert drawn == {"worst", "middling"}
    (far,) = best_and_lower([many], seed=0, min_gap=0.5)
    assert far.rejected == "worst"
    chat = many.replace(task=Task(id="chat", prompt=(user("many?"),)))
    assert best_and_lower([chat], seed=0)[0].chosen == (assistant("best"),)


def test_win_rate_by_hand() -> None:
    games = [
        rated("1", ("new", "x", 1.0), ("old", "y", 0.0)),
        rated("2", ("new", "x", 1.0), ("old", "y", None)),  # nothing was said: lost
        rated("3", ("new", "x", 0.5), ("old", "y", 0.5)),
        rated("4", ("new", "x", 0.0), ("old", "y", 1.0)),
    ]
    found = win_rate(games, "new", "old")
    assert found.value == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert found.n == 4
    assert 0.0 <= found.low < found.value < found.high <= 1.0
    assert win_rate(games, "old", "new").value == pytest.approx(1 - found.value)


class LongerWins(PairwiseJudge):
    """A pairwise judge that counts letters."""

    def __init__(self) -> None:
        self.name = "longer"

    @property
    def deadline_s(self) -> float:
        return 1.0

    async def grade(self, trajectory: object) -> Grade:  # type: ignore[override]
        own, other = len(trajectory.text), len(trajectory.task.facts["opponent"])  # type: ignore[attr-defined]
        return Grade(score=0.5 + 0.5 * ((own > other) - (own < other)), grader=self.name)


def test_a_pairwise_judge_rates_the_two_answers_to_a_prompt() -> None:
    tasks = [Task(id=name, prompt="?") for name in "abc"]
    texts = [("long", "no"), ("ab", "cd"), ("", "word")]
    by_task = [
        [
            (label, trajectory_from_text(task, text, id=f"{task.id}/{label}"))
            for label, text in zip("xy", own, strict=True)
        ]
        for task, own in zip(tasks, texts, strict=True)
    ]
    found = asyncio.run(_rated(tasks, by_task, LongerWins(), Asking(1, 8)))
    scores = [[answer.score for answer in one.answers] for one in found]
    assert scores == [[1.0, 0.0], [0.5, 0.5], [None, 1.0]]


# Rule rewards


def test_rule_rewards_prove_themselves_and_add_up() -> None:
    prove(RightForm()).raise_for_problems()
    prove(rule_rewards(Exact())).raise_for_problems()
    task = Task(id="sum", prompt="2 + 2 =", answer="4")
    texts = [
        "<think>two twos</think><answer> 4 </answer>",
        "<think>hm</think><answer>5</answer>",
        "4",
        "<answer>4</answer>",
    ]
    grades = asyncio.run(grade_all(rule_rewards(Exact()), [trajectory_from_text(task, text) for text in texts]))
    assert [grade.score for grade in grades] == [2.0, 1.0, 0.0, 1.0]
    assert [(grade.parts["accuracy"], grade.parts["format"]) for grade in grades] == [(1, 1), (0, 1), (0, 0), (1, 0)]
    lenient = asyncio.run(
        grade_all(TaggedAnswer(Exact(), strict=False), [trajectory_from_text(task, text) for text in texts])
    )
    assert [grade.score for grade in lenient] == [1.0, 0.0, 1.0, 1.0]


def test_how_a_question_is_asked() -> None:
    task = Task(id="sum", prompt="2 + 2 =")
    assert asked(task, "plain") == task
    assert asked(task, "instructed").prompt == f"{INSTRUCTION}\nUser: 2 + 2 =\nAssistant:"
    chat = asked(task, "chat").prompt
    assert [(turn.role, turn.content) for turn in chat] == [("system", INSTRUCTION), ("user", "2 + 2 =")]


# Settings and stages


def test_published_settings_and_what_outweighs_them() -> None:
    given = {"size": "8b", "sft_lr": (), "dpo_beta": None, "sft_epochs": 3.0, "seed": 0, "chat": False}
    settings = settings_of(TULU3, given)
    assert settings["sft_lr"] == (5e-6,)
    assert settings["dpo_beta"] == 5.0
    assert settings["sft_epochs"] == 3.0
    assert (settings["seed"], settings["chat"]) == (0, False)  # given, though they are nothing
    assert settings_of(TULU3, {**given, "size": "70b"})["ppo_lr"] == (1e-7,)
    for sizes in (TULU3, LLAMA3, R1):
        assert len({frozenset(values) for values in sizes.values()}) == 1, "every size has the same settings"
    assert {name: LLAMA3["published"][name] for name in ("rounds", "sft_lr", "dpo_lr", "dpo_beta", "nll_coef")} == {
        "rounds": 6,
        "sft_lr": 1e-5,
        "dpo_lr": 1e-5,
        "dpo_beta": 0.1,
        "nll_coef": 0.2,
    }
    zero = R1["published"]
    assert zero["prompts_per_step"] * zero["group_size"] == 8192
    assert zero["prompts_per_step"] // zero["minibatches"] == 32
    assert zero["steps"] * zero["minibatches"] == 10_400
    assert zero["reference_every"] * zero["minibatches"] == 400


@pytest.mark.parametrize("size", list(TULU3))
def test_tulu3s_loops_have_the_settings_of_their_size(size: str) -> None:
    for rl, kind in (("ppo", Ppo), ("grpo", Grpo)):
        settings = settings_of(TULU3, {"size": size, "rl": rl, "slots": 8, "dtype": "float32", "seed": 0})
        settings |= {f"rl_{name}": settings[f"{rl}_{name}"] for name in tulu3.RL}
        config = tulu3.rl_config(settings, 1e-6)
        assert isinstance(config, kind)
        assert config.beta == settings[f"{rl}_beta"]
        assert config.prompts_per_step == settings[f"{rl}_prompts"]


def test_r1_zeros_loop_has_the_published_settings() -> None:
    options = {"size": "published", "slots": 8, "dtype": "float32", "seed": 0}
    config = r1_zero.rl_config(settings_of(R1, options))
    assert (config.lr, config.beta, config.group_size, config.minibatches) == (3e-6, 0.001, 16, 16)
    assert (config.clip_low, config.clip_high, config.reference_every) == (10.0, 10.0, 25)
    assert config.scale_rewards


def test_options_of_another_recipe() -> None:
    options = options_of(sft, model="m", data=Path("d"), lr=1e-4)
    assert options["lr"] == 1e-4
    assert options["epochs"] == 2.0
    with pytest.raises(UsageError, match="no option lrate"):
        options_of(sft, model="m", data=Path("d"), lrate=1e-4)
    with pytest.raises(UsageError, match="needs data"):
        options_of(sft, model="m")


def test_a_stage_is_done_once_and_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    calls: list[str] = []

    def broken(stage: Workbench) -> None:
        calls.append("broken")
        raise KeyboardInterrupt

    def whole(stage: Workbench) -> None:
        calls.append("whole")

    with open_workbench("toy", {}, runs=tmp_path / "runs") as bench:
        done_stage(bench, "first", {"lr": 1.0}, whole)
        with pytest.raises(KeyboardInterrupt):
            done_stage(bench, "second", {"lr": 1.0}, broken)
    with open_workbench("toy", {}, runs=tmp_path / "runs", resume=bench.run.path) as resumed:
        first = done_stage(resumed, "first", {"lr": 1.0}, whole)
        second = done_stage(resumed, "second", {"lr": 1.0}, whole)
    assert calls == ["whole", "broken", "whole"]
    states = [RunFolder.open(path, read_only=True).state for path in (first, second)]
    assert [(state.status, state.resumed) for state in states] == [("finished", 0), ("finished", 1)]
