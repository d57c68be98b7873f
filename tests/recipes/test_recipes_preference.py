"""Preferences in recipes: rows to pairs, methods by name, kept references, online rounds, and what is learned."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from posttrain import data as rows
from posttrain import models
from posttrain.core import (
    ConfigError,
    DataError,
    Example,
    Grade,
    Task,
    TokenSequence,
    Trajectory,
    UsageError,
    assistant,
    read_metrics,
    user,
)
from posttrain.data import LabelRow, PreferenceRow
from posttrain.evaluate import mcnemar
from posttrain.models import LoraConfig, add_adapters
from posttrain.recipes import preference_loop
from posttrain.recipes.dpo import dpo
from posttrain.recipes.kto import kto
from posttrain.recipes.online_dpo import OnlineDpo, online_loop, ranked_pairs
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.preference_loop import measure_labels, measure_pairs
from posttrain.recipes.preference_methods import METHODS, method_named
from posttrain.recipes.preference_rendering import label_examples, mismatched, pair_examples, prompt_of
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.reference_cache import (
    Reference,
    adapters_off_reference,
    cached_reference,
    model_fingerprint,
    with_reference,
)
from posttrain.recipes.workbench import Workbench
from posttrain.render import CHATML, Renderer
from posttrain.train import TrainConfig, Trainer, nll_objective, with_step_scalars

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "preference"


def fresh(path: Path, seed: int = 0) -> Policy:
    """A tiny policy of its own, saved in its folder."""
    policy = new_policy(
        ["to be or not to be"],
        vocab_size=262,
        width=32,
        num_layers=1,
        num_heads=2,
        max_positions=64,
        seed=seed,
        path=path,
    )
    policy.save(path)
    return policy


def pair(number: int, chosen: object = "yes", rejected: object = "no", prompt: object = "q:") -> PreferenceRow:
    return PreferenceRow(id=f"rows.jsonl:{number}", prompt=prompt, chosen=chosen, rejected=rejected)  # type: ignore[arg-type]


def trainer_of(policy: Policy) -> Trainer:
    return Trainer(policy.model, TrainConfig(lr=1e-3), nll_objective)


# Rows to examples


def test_a_pair_becomes_two_sequences_that_share_the_prompt(bench: Workbench, tiny_policy: Policy) -> None:
    (example,) = pair_examples(bench, tiny_policy.renderer, [pair(1)], 64)
    chosen, rejected = example.sequences
    decode = tiny_policy.tokenizer.decode
    assert prompt_of(chosen) == prompt_of(rejected) == tiny_policy.renderer.prompt("q:")
    assert decode(chosen.tokens[len(prompt_of(chosen)) :]) == "yes"
    assert decode(rejected.tokens[len(prompt_of(rejected)) :]) == "no"
    assert chosen.tokens[-1] == rejected.tokens[-1] == tiny_policy.tokenizer.eos_id
    assert chosen.mask[-1], "that the answer ends is learned too"
    assert example.sequences[0].columns == {}


def test_bad_pairs_are_quarantined_and_counted(bench: Workbench, tiny_policy: Policy, capsys) -> None:
    good = [pair(number, chosen=f"yes {number}") for number in range(1, 41)]
    bad = [pair(41, rejected="  "), pair(42, chosen="x" * 200)]
    examples = pair_examples(bench, tiny_policy.renderer, [*good, *bad], 64)
    assert len(examples) == 40
    (line,) = (bench.run.path / "bad_pairs.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["file"], row["line"], row["field"], row["cause"]) == ("rows.jsonl", 41, "rejected", "is empty")
    assert json.loads(row["raw"])["chosen"] == "yes"
    assert "40 of 42 rows used, 1 too long, 1 bad (bad_pairs.jsonl): 1 × rejected: is empty" in capsys.readouterr().out
    with pytest.raises(DataError, match="2 × chosen: is empty"):
        pair_examples(bench, tiny_policy.renderer, [*good, pair(50, chosen=""), pair(51, chosen=" ")][-20:], 64)


def test_an_answer_of_messages_that_say_nothing_is_empty(bench: Workbench, tiny_policy: Policy) -> None:
    renderer = Renderer(tiny_policy.tokenizer, CHATML)
    good = [pair(n, (assistant("yes"),), (assistant(f"n{n}"),), (user("q"),)) for n in range(1, 31)]
    bad = pair(31, (assistant(""),), (assistant("no"),), (user("q"),))
    assert len(pair_examples(bench, renderer, [*good, bad], 64)) == 30
    assert '"is empty"' in (bench.run.path / "bad_pairs.jsonl").read_text()


def test_sides_with_different_prompts_are_refused(bench: Workbench, tiny_policy: Policy) -> None:
    """A template that counts the turns at its head shows the two sides different prompts."""
    renderer = Renderer(tiny_policy.tokenizer, "{{ 'N=' ~ messages|length ~ '\n' }}" + CHATML)
    longer = (assistant("no"), user("why"), assistant("so"))
    bad = pair(99, (assistant("yes"),), longer, (user("q"),))
    good = [pair(n, (assistant("yes"),), (assistant("no"),), (user("q"),)) for n in range(1, 31)]
    examples = pair_examples(bench, renderer, [*good, bad], 64)
    assert len(examples) == 30
    assert "prompt" in (text := (bench.run.path / "bad_pairs.jsonl").read_text()), text
    assert "has another prompt than chosen once rendered" in text
    assert "part at token" in text


def test_format_tokens_and_prompts_by_columns_of_weights(bench: Workbench, tiny_policy: Policy) -> None:
    (masked,) = pair_examples(bench, tiny_policy.renderer, [pair(1)], 64, mask_format=True)
    for sequence in masked.sequences:
        weights = sequence.columns["margin_weights"]
        assert sequence.mask[-1] is True
        assert weights[-1] == 0.0, "the end of turn is left out of the preference"
        assert sum(weights) == sum(sequence.mask) - 1
    (whole,) = pair_examples(bench, tiny_policy.renderer, [pair(1)], 64, nll_over_prompt=True)
    chosen, rejected = whole.sequences
    (plain,) = pair_examples(bench, tiny_policy.renderer, [pair(1)], 64)
    assert chosen.mask == (False,) + (True,) * (len(chosen.tokens) - 1)
    assert rejected.mask == plain.sequences[1].mask
    assert chosen.columns["margin_weights"] == tuple(map(float, plain.sequences[0].mask))


def labels(count: int) -> list[LabelRow]:
    return [
        LabelRow(id=f"l:{number}", prompt=f"p{number}:", completion=f"answer {number}", label=number % 2 == 0)
        for number in range(1, count + 1)
    ]


def test_mismatched_answers_are_each_anothers(bench: Workbench, tiny_policy: Policy) -> None:
    examples = label_examples(bench, tiny_policy.renderer, labels(9), 64)
    assert [example.scalars["label"] for example in examples] == [0.0, 1.0] * 4 + [0.0]
    others = mismatched(examples, 64, seed=3)
    answers = {}
    for example, other in zip(examples, others, strict=True):
        own, borrowed = example.sequences[0], other.sequences[0]
        prompt = prompt_of(own)
        assert other.id == example.id
        assert borrowed.tokens[: len(prompt)] == prompt
        assert prompt_of(borrowed) == prompt
        assert borrowed.tokens != own.tokens
        answers[borrowed.tokens[len(prompt) :]] = True
    assert len(answers) == 9, "every answer once"
    assert mismatched(examples, 64, seed=3) == others
    short = mismatched(examples, 8, seed=3)
    assert all(len(example.sequences[0].tokens) <= 8 and example.num_targets() for example in short)


# Methods


@pytest.mark.parametrize("name", METHODS)
def test_every_method_steps(name: str, tiny_policy: Policy, bench: Workbench) -> None:
    method = method_named(name)
    policy = replace(tiny_policy, model=copy.deepcopy(tiny_policy.model))
    from posttrain.train import collision_forward, token_forward

    forward = collision_forward if method.pair_weights == "wpo" else token_forward
    trainer = Trainer(policy.model, TrainConfig(lr=1e-3), method.objective(), forward=forward)
    examples = pair_examples(
        bench,
        policy.renderer,
        [pair(number, chosen=f"yes {number}") for number in range(1, 7)],
        64,
        mask_format=method.mask_format,
        nll_over_prompt=method.nll_over_prompt,
    )
    if method.reference:
        examples = with_reference(examples, trainer.logprobs(examples))
    metrics = trainer.step(with_step_scalars(examples))
    assert math.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0
    assert ("nll_loss" in metrics) == bool(method.nll_coef)
    assert method.source
    if name in ("sigmoid", "sigmoid_norm", "cdpo", "aot"):
        assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-5)


def test_settings_without_a_place_are_refused() -> None:
    with pytest.raises(ConfigError, match="label smoothing"):
        replace(method_named("ipo"), label_smoothing=0.1).objective()
    with pytest.raises(ConfigError, match="divergence"):
        method_named("nca_pair").objective("js")
    method_named("sigmoid").objective("js")
    with pytest.raises(UsageError, match="there are sigmoid"):
        method_named("dopo")


def test_options_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lora-rank"):
        dpo(model="nowhere", data=tmp_path / "no.jsonl", reference="adapters-off", runs=tmp_path)
    with pytest.raises(UsageError, match="no preference loss"):
        dpo(model="nowhere", data=tmp_path / "no.jsonl", loss="dopo", runs=tmp_path)
    assert not any(tmp_path.iterdir())


# The reference


@pytest.fixture
def examples(bench: Workbench, tiny_policy: Policy) -> list[Example]:
    return pair_examples(bench, tiny_policy.renderer, [pair(n, chosen=f"yes {n}") for n in range(1, 7)], 64)


def test_the_reference_is_computed_once_and_reread(
    examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(fresh(tmp_path / "model"))
    calls = []
    compute = trainer.logprobs
    monkeypatch.setattr(trainer, "logprobs", lambda given: calls.append(len(given)) or compute(given))
    said: list[str] = []
    first = cached_reference(examples, trainer, tmp_path / "kept", report=said.append)
    assert first == with_reference(examples, compute(examples))
    again = cached_reference(examples, trainer, tmp_path / "kept", report=said.append)
    assert again == first
    assert calls == [len(examples)]
    assert ["computed" in said[0], "read from" in said[1]] == [True, True]
    (file,) = (tmp_path / "kept").iterdir()
    content = file.read_bytes()
    for damage in (content[: len(content) // 2], b"", content[:-4] + b"\x00\x00\xc0\x7f"):  # torn, empty, a NaN
        file.write_bytes(damage)
        assert cached_reference(examples, trainer, tmp_path / "kept", report=said.append) == first
        assert "made anew" in said[-2]
    cached_reference(examples[:3], trainer, tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2, "other pairs, another file"
    before = model_fingerprint(trainer.model)
    with torch.no_grad():
        trainer.model.embed.weight[5, 0] += 1e-3
    assert model_fingerprint(trainer.model) != before
    assert cached_reference(examples, trainer, tmp_path / "kept") != first
    assert len(list((tmp_path / "kept").iterdir())) == 3, "other weights, another file"


def test_adapters_off_is_the_base(examples: list[Example], tmp_path: Path) -> None:
    policy = fresh(tmp_path / "model")
    expected = with_reference(examples, trainer_of(policy).logprobs(examples))
    with pytest.raises(UsageError, match="no adapters"):
        Reference("adapters-off", trainer_of(policy), tmp_path)
    add_adapters(policy.model, LoraConfig(rank=4), seed=0)
    trainer = trainer_of(policy)
    reference = Reference("adapters-off", trainer, tmp_path)
    assert reference.before_training(examples) == examples
    for _ in range(5):
        trainer.step(examples)
    found = reference.at_step(examples)
    moved = trainer.logprobs(examples)
    for one, other, now in zip(found, expected, moved, strict=True):
        for ours, base, policys in zip(one.sequences, other.sequences, now, strict=True):
            assert ours.columns["ref_logprobs"] == pytest.approx(base.columns["ref_logprobs"], abs=1e-6)
            assert policys != pytest.approx(base.columns["ref_logprobs"], abs=1e-3)
    assert found == adapters_off_reference(examples, trainer)


def test_what_is_measured_on_held_out_pairs(examples: list[Example], tmp_path: Path) -> None:
    trainer = trainer_of(fresh(tmp_path / "model"))
    columns = trainer.logprobs(examples)
    sums = [[math.fsum(column) for column in own] for own in columns]
    referred = [
        example.replace(
            sequences=tuple(
                sequence.replace(
                    columns={
                        "ref_logprobs": tuple(
                            (value - shift) * is_target for value, is_target in zip(column, sequence.mask, strict=True)
                        )
                    }
                )
                for sequence, column, shift in zip(example.sequences, own, (0.5, 0.1), strict=True)
            )
        )
        for example, own in zip(examples, columns, strict=True)
    ]  # every target of the chosen answer is 0.5 likelier than under the reference, of the rejected one 0.1
    metrics, right = measure_pairs(trainer, referred, beta=2.0, per_token=True)
    assert metrics["eval/rewards/chosen"] == pytest.approx(1.0, rel=1e-4)
    assert metrics["eval/rewards/margins"] == pytest.approx(0.8, rel=1e-4)
    assert metrics["eval/rewards/accuracies"] == 1.0
    tokens = [[example.sequences[side].mask.count(True) for side in (0, 1)] for example in examples]
    assert right == [own[0] / count[0] > own[1] / count[1] for own, count in zip(sums, tokens, strict=True)]
    answers = [
        example.replace(sequences=(example.sequences[index % 2],), scalars={"label": float(index % 2 == 0)})
        for index, example in enumerate(referred)
    ]
    metrics, _ = measure_labels(trainer, answers, beta=1.0)
    assert metrics["eval/rewards/auc"] == 1.0
    assert metrics["eval/rewards/margins"] > 0


# Online


class LikesEven:
    """A grader that likes even token ids."""

    name = "even"

    async def grade(self, trajectory: Trajectory) -> Grade:
        wrote = [token for token, own in zip(trajectory.tokens, trajectory.mask, strict=True) if own]
        return Grade(score=sum(token % 2 == 0 for token in wrote) / len(wrote), grader=self.name)


def test_best_and_worst_by_hand(make_group) -> None:
    groups = [
        make_group("plain", ["a", "b", "c"]),
        make_group("tied", ["a", "b", "c"]),
        make_group("failed", ["a", None, None]),
        make_group("ungraded", ["a", "b", "c"]),
    ]
    groups = [
        group.__class__(
            task=group.task,
            trajectories=tuple(
                each.replace(tokens=(5, 6 + place, 7)[: len(each.tokens)])
                for place, each in enumerate(group.trajectories)
            ),
        )
        for group in groups
    ]
    scores = [0.5, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, None, 0.3, 0.9]
    grades = [Grade(score=score, grader="toy", error=None if score is not None else "crashed") for score in scores]
    pairs, counts = ranked_pairs(groups, grades)
    assert counts == {"pairs/taken": 2.0, "pairs/tied": 1.0, "pairs/failed": 1.0}
    assert [[sequence.tokens for sequence in each.sequences] for each in pairs] == [
        [(5, 7, 7), (5, 8, 7)],  # siblings 1 and 2
        [(5, 8, 7), (5, 7, 7)],  # siblings 2 and 1: 0 was not graded
    ]
    same = ranked_pairs([make_group("same", ["a", "a"])], [grades[0], grades[1]])  # the same tokens, unlike scores
    assert same.metrics["pairs/tied"] == 1.0
    assert not same.pairs


def online(bench: Workbench, policy: Policy, rounds: int, reference: str = "start", **changes: int) -> dict[str, float]:
    config = OnlineDpo.from_dict(
        {
            "rounds": rounds,
            "prompts_per_round": 3,
            "group_size": 4,
            "max_tokens": 6,
            "batch_size": 4,
            "dtype": "float32",
            "reference": reference,
            "checkpoint_every": 2,
            **changes,
        }
    )
    tasks = [Task(id=str(number), prompt=f"{number}+1=") for number in range(6)]
    method = replace(method_named("sigmoid"), lr=5e-3)
    return asyncio.run(online_loop(bench, policy, tasks, LikesEven(), method, config))


@pytest.mark.parametrize("reference", ["start", "round"])
def test_online_rounds_resume_to_the_same_weights(
    bench: Workbench, tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.recipes import online_dpo
    from posttrain.recipes.workbench import open_workbench

    whole = fresh(tmp_path / "model")
    metrics = online(bench, whole, 5, reference)
    assert metrics["num_steps"] >= 3
    with open_workbench("toy", {}, runs=tmp_path / "again") as other:
        killed = fresh(tmp_path / "model")
        learn, done = online_dpo.learn, []

        def dies(*args, **kwargs):
            done.append(1)
            if len(done) == 4:  # in the fourth round, after the checkpoint of the second
                raise KeyboardInterrupt
            return learn(*args, **kwargs)

        monkeypatch.setattr(online_dpo, "learn", dies)
        with pytest.raises(KeyboardInterrupt):
            online(other, killed, 5, reference)
        monkeypatch.setattr(online_dpo, "learn", learn)
        resumed = fresh(tmp_path / "model")
        online(other, resumed, 5, reference)
        steps = [row["step"] for row in read_metrics(other.run.path / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5]
    for (name, one), (_, two) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.slow
def test_online_rounds_raise_the_reward(bench: Workbench, tmp_path: Path) -> None:
    online(bench, fresh(tmp_path / "model"), 24, prompts_per_round=6, group_size=6, checkpoint_every=24)
    rewards = [row["reward"] for row in read_metrics(bench.run.path / "metrics.jsonl")]
    assert min(rewards[-6:]) > max(rewards[:6]), rewards  # by chance 1 in 924


# Whole runs


def write_pairs(path: Path, count: int, seed: int) -> Path:
    """After a prompt that begins with a, red is better than blue; after b it is the other way round."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        kind, filling = rng.choice("ab"), "".join(rng.choice("cdefgh") for _ in range(4))
        chosen, rejected = ("red", "blue") if kind == "a" else ("blue", "red")
        lines.append(json.dumps({"prompt": f"{kind}{filling}:", "chosen": chosen, "rejected": rejected}))
    path.write_text("\n".join(lines))
    return path


def test_a_killed_dpo_run_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh(tmp_path / "base")
    options = {
        "model": str(tmp_path / "base"),
        "data": write_pairs(tmp_path / "pairs.jsonl", 40, 0),
        "loss": "rpo",
        "held_out": 8,
        "batch_size": 8,
        "lr": 1e-3,
        "dtype": "float32",
    }
    whole = dpo(**options, runs=tmp_path / "whole")
    real = preference_loop.PreferenceLoop
    monkeypatch.setattr(preference_loop.Trainer, "step", _dying(preference_loop.Trainer.step, 4))
    monkeypatch.setattr("posttrain.recipes.preference_run.PreferenceLoop", lambda **kw: real(**kw, checkpoint_every=2))
    with pytest.raises(KeyboardInterrupt):
        dpo(**options, runs=tmp_path / "killed")
    monkeypatch.undo()
    (folder,) = (path for path in (tmp_path / "killed").iterdir() if (path / "run.json").is_file())
    said = dpo(**options, runs=tmp_path / "killed", resume=folder)
    assert "read from" in (said / "events.log").read_text(), "the reference is not computed again"
    one, two = (models.load(path / "model").state_dict() for path in (whole, said))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bcos_running_shift_outlives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """δ is the mean of all rewards so far, of the first step 0; a run that was killed goes on with it."""
    fresh(tmp_path / "base")
    options = {
        "model": str(tmp_path / "base"),
        "data": write_pairs(tmp_path / "pairs.jsonl", 24, 0),
        "loss": "bco",
        "beta": 0.5,
        "held_out": 0,
        "batch_size": 8,
        "kl_prompts": 0,
        "lr": 1e-3,
        "dtype": "float32",
    }
    whole = kto(**options, runs=tmp_path / "whole")
    shifts = [row["delta"] for row in read_metrics(whole / "metrics.jsonl") if "delta" in row]
    assert shifts[0] == 0.0
    assert len(set(shifts)) == len(shifts) == 6
    real = preference_loop.PreferenceLoop
    monkeypatch.setattr(preference_loop.Trainer, "step", _dying(preference_loop.Trainer.step, 4))
    monkeypatch.setattr("posttrain.recipes.preference_run.PreferenceLoop", lambda **kw: real(**kw, checkpoint_every=2))
    with pytest.raises(KeyboardInterrupt):
        kto(**options, runs=tmp_path / "killed")
    monkeypatch.undo()
    (folder,) = (path for path in (tmp_path / "killed").iterdir() if (path / "run.json").is_file())
    resumed = kto(**options, runs=tmp_path / "killed", resume=folder)
    assert [row["delta"] for row in read_metrics(resumed / "metrics.jsonl") if "delta" in row] == shifts
    one, two = (models.load(path / "model").state_dict() for path in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    by_step = kto(**options, reward_shift="step", runs=tmp_path / "steps")
    assert [row["delta"] for row in read_metrics(by_step / "metrics.jsonl") if "delta" in row] != shifts


def _dying(step: Callable, at: int) -> Callable:
    def wrapped(self, given):
        if self.num_steps == at - 1:
            raise KeyboardInterrupt
        return step(self, given)

    return wrapped


def ranked_rightly(folder: Path, file: Path) -> list[bool]:
    """Whether a model finds the chosen answer likelier, for each pair of a file."""
    policy = load_policy(str(folder))
    found = []
    for row in rows.load(file, kind="preference").rows:
        sides = [policy.renderer.completion_pair(str(row.prompt), str(side)) for side in (row.chosen, row.rejected)]
        example = Example(
            id=row.id, sequences=tuple(TokenSequence(tokens=side.tokens, mask=side.mask) for side in sides)
        )
        chosen, rejected = (math.fsum(column) for column in trainer_of(policy).logprobs([example])[0])
        found.append(chosen > rejected)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sigmoid", "simpo", "kto"])
def test_held_out_preferences_are_learned(tmp_path: Path, method: str) -> None:
    fresh(tmp_path / "base")
    train_file, apart = write_pairs(tmp_path / "pairs.jsonl", 200, 0), write_pairs(tmp_path / "apart.jsonl", 64, 1)
    options = {
        "model": str(tmp_path / "base"),
        "data": train_file,
        "held_out": 0,
        "epochs": 4 if method == "kto" else 6,
        "batch_size": 16,
        "lr": 5e-3,
        "dtype": "float32",
        "runs": tmp_path / "runs",
    }
    run = kto(**options) if method == "kto" else dpo(**options, loss=method)
    before, after = (ranked_rightly(folder, apart) for folder in (tmp_path / "base", run / "model"))
    wins = sum(now and not then for then, now in zip(before, after, strict=True))
    losses = sum(then and not now for then, now in zip(before, after, strict=True))
    assert sum(after) / len(after) > 0.9
    assert mcnemar(wins, losses) < 1e-3
    assert wins > losses


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [dpo, kto], ids=["dpo", "kto"])
def test_real_preferences(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    file = DATA / "mt_bench_human_200.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"{file.name} is not here")
    policy = new_policy(
        ["the and of to a in is you that it for on as are with"],
        vocab_size=280,
        width=32,
        num_layers=1,
        num_heads=2,
        max_positions=2048,
        seed=0,
        path=tmp_path / "base",
    )
    policy.save(tmp_path / "base")
    run = recipe(
        model=str(tmp_path / "base"),
        data=file,
        chat=True,
        limit=40,
        held_out=8,
        batch_size=8,
        epochs=3.0,
        lr=3e-4,
        dtype="float32",
        runs=tmp_path / "runs",
    )
    steps = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    third = len(steps) // 3
    first, last = [sum(row["loss"] for row in part) / third for part in (steps[:third], steps[-third:])]
    assert last < first, "what was seen twice before is told better"
    assert sum(row.get("rewards/margins", 0.0) for row in steps[-third:]) > 0  # a step may have one side only
    load_policy(str(run / "model"))
