"""Distillation recipes: teachers and their cache, examples, refusals, and students that come near their teachers."""

from __future__ import annotations

import asyncio
import importlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from posttrain import models
from posttrain.core import (
    DataError,
    Example,
    ModelError,
    RolloutError,
    Sampling,
    StopReason,
    Task,
    TokenSequence,
    UsageError,
    read_metrics,
)
from posttrain.recipes.distill import beta_of, distill
from posttrain.recipes.on_policy_distill import OnPolicy, on_policy_distill, on_policy_loop
from posttrain.recipes.policy import Policy
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.teacher_answers import answer_examples, only_right
from posttrain.recipes.teacher_scores import Scorer
from posttrain.recipes.teachers import (
    LocalTeacher,
    RemoteTeacher,
    TeacherAnswer,
    cached_answers,
    load_teacher,
    prompt_hash,
    shared_entries,
)
from posttrain.recipes.workbench import Workbench
from posttrain.rollout import run_groups
from posttrain.train import TrainConfig, Trainer, nll_objective

TASKS = [Task(id=f"task-{number}", prompt=f"be {number} ") for number in range(6)]
TEXT = ["to be or not to be"]


def make(path: Path, seed: int, *, width: int = 32, sharp: float = 1.0, vocab_size: int = 262) -> Policy:
    """A policy with random weights; `sharp` above 1 makes its distributions less flat."""
    policy = new_policy(
        TEXT, vocab_size=vocab_size, width=width, num_layers=1, num_heads=2, max_positions=64, seed=seed, path=path
    )
    with torch.no_grad():
        policy.model.final_norm.weight.mul_(sharp)
    return policy


def teach(policy: Policy, lines: list[dict[str, str]], steps: int = 25) -> Policy:
    """Pairs half learned: a teacher that ends its answers and is not sure of them."""
    rendered = [policy.renderer.completion_pair(line["prompt"], line["completion"]) for line in lines]
    examples = [
        Example(id=str(number), sequences=(TokenSequence(tokens=r.tokens, mask=r.mask),))
        for number, r in enumerate(rendered)
    ]
    trainer = Trainer(policy.model, TrainConfig(lr=5e-3), nll_objective)
    for _ in range(steps):
        trainer.step(examples)
    return policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a wider teacher of its vocabulary, one of another, prompts, and pairs."""
    folder = tmp_path_factory.mktemp("distill")
    for name, options in {
        "student": {"seed": 0},
        "stranger": {"seed": 1, "vocab_size": 259},
    }.items():
        make(folder / name, **options).save(folder / name)  # type: ignore[arg-type]
    lines = [{"prompt": f"be {number} ", "completion": f"or {number}"} for number in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    teach(make(folder / "teacher", 1, width=48), lines).save(folder / "teacher")
    prompts = [{"prompt": line["prompt"], "answer": "x"} for line in lines]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    return folder


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    common = {
        "model": str(folder / "student"),
        "teacher": str(folder / "teacher"),
        "runs": str(folder / "runs"),
        "max_tokens": 6,
        "dtype": "float32",
        "lr": 3e-3,
    }
    return {**common, **changes}


def metrics_of(run: Path) -> list[dict[str, float]]:
    return read_metrics(run / "metrics.jsonl")


# Teachers and the cache


class Counting:
    """A teacher that remembers what it was asked, and answers nothing to some."""

    identity = "counting"

    def __init__(self, silent: tuple[str, ...] = ()) -> None:
        self.asked: list[str] = []
        self.silent = silent

    async def answer(self, tasks: list[Task], sampling: Sampling) -> list[list[TeacherAnswer]]:
        self.asked += [task.id for task in tasks]
        return [
            []
            if task.id in self.silent
            else [
                TeacherAnswer(prompt=prompt_hash(task), index=index, text=f"{task.id}!", tokens=(5, 6))
                for index in range(sampling.n)
            ]
            for task in tasks
        ]


def test_a_teacher_is_asked_once(tmp_path: Path) -> None:
    teacher, sampling = Counting(), Sampling(n=2, seed=1)
    first = asyncio.run(cached_answers(teacher, TASKS[:4], sampling, tmp_path))
    again = asyncio.run(cached_answers(teacher, TASKS, sampling, tmp_path))
    assert teacher.asked == [task.id for task in TASKS]
    assert again[:4] == first
    assert [len(own) for own in again] == [2] * 6
    same = [task.replace(id=f"other-{task.id}") for task in TASKS]  # the same prompts under other ids
    asyncio.run(cached_answers(teacher, same, sampling, tmp_path))
    assert len(teacher.asked) == 6
    asyncio.run(cached_answers(teacher, TASKS, sampling.replace(temperature=0.5), tmp_path))
    assert len(teacher.asked) == 12, "another sampling is another question"


def test_a_torn_line_is_asked_for_again(tmp_path: Path) -> None:
    teacher = Counting()
    asyncio.run(cached_answers(teacher, TASKS[:2], Sampling(), tmp_path))
    (file,) = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-10])
    found = asyncio.run(cached_answers(teacher, TASKS[:2], Sampling(), tmp_path))
    assert teacher.asked == ["task-0", "task-1", "task-1"]
    assert all(found)


def test_too_many_silent_prompts_stop_the_run(tmp_path: Path) -> None:
    teacher = Counting(silent=("task-1", "task-2"))
    with pytest.raises(RolloutError, match="answered 4 of 6 prompts"):
        asyncio.run(cached_answers(teacher, TASKS, Sampling(), tmp_path))
    found = asyncio.run(cached_answers(teacher, TASKS, Sampling(), tmp_path, max_failed=0.5))
    assert [len(own) for own in found] == [1, 0, 0, 1, 1, 1]


def test_a_local_teacher_tells_its_likeliest_tokens(tmp_path: Path) -> None:
    policy = make(tmp_path / "teacher", 1, sharp=6.0)
    with policy.engine(slots=8, length=64, inline=True) as engine:
        teacher = LocalTeacher(policy, engine, "me")
        found = asyncio.run(teacher.answer(TASKS[:2], Sampling(max_tokens=4, top_logprobs=3)))
    for (answer,), task in zip(found, TASKS, strict=False):
        assert answer.prompt == prompt_hash(task)
        assert len(answer.top) == len(answer.tokens) > 0
        assert all(len(told) >= 3 for told in answer.top)
        # the first told distribution is the model's own after the prompt
        logits = policy.model(torch.tensor([policy.renderer.prompt(task)]))[0, -1].log_softmax(-1)
        best = logits.topk(3)
        assert set(best.indices.tolist()) <= answer.top[0].keys()
        assert answer.top[0][int(best.indices[0])] == pytest.approx(best.values[0].item(), abs=1e-4)


# An endpoint


def endpoint(policy: Policy, seen: list[dict[str, Any]]) -> httpx.MockTransport:
    """A server with vLLM's extensions over a policy's own numbers; it always answers "or" and stops."""

    def reply(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        seen.append({"path": request.url.path, **body})
        if body.get("prompt_logprobs") is not None:
            tokens = body["prompt"]
            log_p = policy.model(torch.tensor([tokens]))[0].log_softmax(-1)
            told: list[Any] = [None]
            told += [{str(t): {"logprob": log_p[i, t].item()}} for i, t in enumerate(tokens[1:])]
            return httpx.Response(200, json={"choices": [{"text": "", "prompt_logprobs": told}]})
        if request.url.path.endswith("/chat/completions"):
            choice = {"message": {"role": "assistant", "content": "or"}, "finish_reason": "stop"}
        else:
            ids = policy.tokenizer.encode("or")
            texts = [policy.tokenizer.decode([token]) for token in ids]
            tops = [{f"token_id:{ids[0]}": -0.1, "token_id:7": -3.0}, *({text: -0.2} for text in texts[1:])]
            choice = {
                "text": "or",
                "finish_reason": "stop",
                "token_ids": ids,
                "logprobs": {"top_logprobs": tops} if body.get("logprobs") else None,
            }
        return httpx.Response(200, json={"choices": [choice] * body.get("n", 1)})

    return httpx.MockTransport(reply)


def test_an_endpoint_answers_texts_and_conversations(tmp_path: Path) -> None:
    from posttrain.core import user

    policy, seen = make(tmp_path / "m", 0), []
    teacher = RemoteTeacher("http://there", "big", policy, transport=endpoint(policy, seen))
    tasks = [TASKS[0], Task(id="talk", prompt=(user("be"),))]
    plain, talk = asyncio.run(teacher.answer(tasks, Sampling(n=2, max_tokens=5, seed=3)))
    assert [answer.text for answer in plain + talk] == ["or"] * 4
    assert [answer.index for answer in plain] == [0, 1]
    assert sorted(call["path"] for call in seen) == ["/v1/chat/completions", "/v1/completions"]
    assert all(call["model"] == "big" and call["max_tokens"] == 5 for call in seen)


def test_an_endpoint_tells_its_likeliest_tokens_as_ids_or_as_text(tmp_path: Path) -> None:
    policy, seen = make(tmp_path / "m", 0), []
    teacher = RemoteTeacher("http://there", "big", policy, transport=endpoint(policy, seen))
    ((answer,),) = asyncio.run(teacher.answer(TASKS[:1], Sampling(top_logprobs=2)))
    ids = policy.tokenizer.encode("or")
    assert answer.tokens == tuple(ids)
    assert answer.top[0] == {ids[0]: -0.1, 7: -3.0}
    assert all(told == {token: -0.2} for token, told in zip(ids[1:], answer.top[1:], strict=True))
    assert seen[0]["prompt"] == list(policy.renderer.prompt(TASKS[0]))


def test_an_endpoint_that_breaks_gives_no_answer(tmp_path: Path) -> None:
    policy = make(tmp_path / "m", 0)
    broken = httpx.MockTransport(lambda request: httpx.Response(400, json={"error": "no"}))
    teacher = RemoteTeacher("http://there", "big", policy, transport=broken)
    assert asyncio.run(teacher.answer(TASKS[:1], Sampling())) == [[]]


def test_an_endpoints_scores_are_those_of_the_folder(tmp_path: Path) -> None:
    student, teacher = make(tmp_path / "s", 0), make(tmp_path / "t", 1, sharp=4.0)
    remote = RemoteTeacher("http://there", "big", student, transport=endpoint(teacher, []))
    with student.engine(slots=8, length=64, inline=True) as engine:
        groups = asyncio.run(
            run_groups(engine, TASKS[:2], Sampling(n=2, max_tokens=5), prompt_tokens=student.renderer.prompt, seed=0)
        )

    def credit(source: Policy | RemoteTeacher) -> list[list[list[float] | None]]:
        scorer = Scorer(source, micro_tokens=512, dtype="float32", temperature=1.0)
        return asyncio.run(scorer.advantages(groups, None))

    near, far = credit(teacher), credit(remote)
    for group, ours, theirs in zip(groups, near, far, strict=True):
        for trajectory, mine, told in zip(group.trajectories, ours, theirs, strict=True):
            assert mine is not None
            assert told == pytest.approx(mine, abs=1e-4)
            log_p = teacher.model(torch.tensor([trajectory.tokens]))[0].log_softmax(-1)
            for place, wrote in enumerate(trajectory.mask):
                expected = (
                    log_p[place - 1, trajectory.tokens[place]].item() - trajectory.logprobs[place] if wrote else 0
                )
                assert mine[place] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UsageError, match="temperature 1"):
        Scorer(remote, micro_tokens=512, dtype="float32", temperature=0.7)


# Examples


def answers(*texts: str, clipped: bool = False) -> list[TeacherAnswer]:
    reason = StopReason.LENGTH if clipped else StopReason.EOS
    return [
        TeacherAnswer(prompt="p", index=index, text=text, tokens=(9, 2), stop_reason=reason)
        for index, text in enumerate(texts)
    ]


def test_cut_and_repeated_answers_are_left_out(bench: Workbench, tiny_policy: Policy) -> None:
    found = [answers("a", "a", "b"), answers("c", clipped=True)]
    examples = answer_examples(bench, tiny_policy, TASKS[:2], found)
    assert [example.id for example in examples] == ["task-0/0", "task-0/2"]
    tokens, eos = examples[0].sequences[0].tokens, tiny_policy.tokenizer.eos_id
    assert tokens == (*tiny_policy.renderer.prompt(TASKS[0]), *tiny_policy.tokenizer.encode("a"), eos)
    exact = answer_examples(bench, tiny_policy, TASKS[:1], found[:1], exact=True)
    assert exact[0].sequences[0].tokens[-2:] == (9, 2)
    with pytest.raises(DataError, match="no answer to learn from"):
        answer_examples(bench, tiny_policy, TASKS[1:2], found[1:])
    with pytest.raises(DataError, match="told no top logprobs"):
        answer_examples(bench, tiny_policy, TASKS[:1], found[:1], top_k=2)


def test_only_right_answers(tmp_path: Path) -> None:
    from posttrain.grade import Exact

    task = TASKS[0].replace(answer="yes")
    (left,) = asyncio.run(only_right([task], [answers("no", "yes")], Exact()))
    assert [answer.text for answer in left] == ["yes"]


# Refusals


def test_another_vocabulary_is_refused_with_the_way_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"259 ids.*262 ids.*--answers teacher --loss nll"):
        load_teacher(str(folder / "stranger"), make(tmp_path / "m", 0))
    with pytest.raises(ModelError, match="--loss nll"):
        distill.run_with(
            options(folder, teacher=str(folder / "stranger"), data=str(folder / "prompts.jsonl"), loss="jsd")
        )


def test_same_size_other_tokens_is_refused_and_says_which(tmp_path: Path) -> None:
    ours, theirs = make(tmp_path / "a", 0), make(tmp_path / "b", 0)
    text = (theirs.save(tmp_path / "b") / "tokenizer.json").read_text()
    definition = json.loads(text)
    vocabulary = definition["model"]["vocab"]
    names = list(vocabulary)
    one, two = names[100], names[101]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ModelError, match=r"262 ids.*id \d+ is .* here and .* there"):
        load_teacher(str(tmp_path / "b"), ours)


def test_options_that_cannot_be(folder: Path) -> None:
    data = str(folder / "pairs.jsonl")
    for wrong, words in [
        ({"answers": "data", "loss": "nll"}, "use sft"),
        ({"top_k": 3}, "needs a divergence"),
        ({"teacher": "http://there", "loss": "jsd"}, "whole distribution"),
        ({"teacher": "http://there"}, "--teacher-model"),
    ]:
        with pytest.raises(UsageError, match=words):
            distill.run_with(options(folder, data=data, **wrong))
    assert [beta_of(loss, 0.3) for loss in ("forward_kl", "reverse_kl", "jsd")] == [0.0, 1.0, 0.3]


def test_heads_padded_differently_compare_what_they_share(tmp_path: Path) -> None:
    student, teacher = make(tmp_path / "s", 0), make(tmp_path / "t", 1)
    config = teacher.model.config.replace(vocab_size=272)
    padded = models.Decoder.random(config, seed=1)
    bigger = Policy(padded, teacher.tokenizer, teacher.renderer, teacher.path)
    assert shared_entries(student, teacher) is None
    assert shared_entries(student, bigger) == student.tokenizer.vocab_size


# The recipes


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "nll"},
        {"loss": "forward_kl"},
        {"loss": "reverse_kl", "nll_weight": 0.2, "softness": 2.0},
        {"loss": "forward_kl", "top_k": 8},
        {"loss": "jsd", "answers": "data", "data": "pairs.jsonl"},
    ],
    ids=["nll", "forward_kl", "reverse_kl", "top_k", "data"],
)
def test_distill_brings_the_student_nearer(folder: Path, changes: dict[str, Any]) -> None:
    data = str(folder / changes.pop("data", "prompts.jsonl"))
    run = distill.run_with(
        options(folder, data=data, held_out=4, epochs=8, batch_size=8, samples=3, temperature=0.7, **changes)
        if changes.get("answers") != "data"
        else options(folder, data=data, held_out=4, epochs=8, batch_size=8, **changes)
    )
    rows = metrics_of(run)
    name = "nll" if changes["loss"] == "nll" else "divergence"
    assert rows[-1][name] < rows[1][name]
    if changes.get("answers") != "data":
        assert rows[-1]["eval/nll"] < rows[0]["eval/nll"]
    assert (run / "model" / "model.safetensors").is_file()
    assert models.load(run / "model").config.width == 32
    assert not torch.equal(models.load(run / "model").embed.weight, models.load(folder / "student").embed.weight)


def test_distill_resumes_a_finished_run_and_asks_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = options(folder, data=str(folder / "prompts.jsonl"), epochs=1, seed=5, held_out=2)
    run = distill.run_with(wanted)
    weights = models.load(run / "model").embed.weight.clone()

    async def refuse(self: LocalTeacher, tasks: Any, sampling: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(LocalTeacher, "answer", refuse)
    again = distill.run_with({**wanted, "resume": str(run)})
    assert again == run
    torch.testing.assert_close(models.load(run / "model").embed.weight, weights, atol=0, rtol=0)


def test_a_killed_distillation_goes_on_to_the_same_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("posttrain.recipes.distill")
    wanted = options(
        folder, data=str(folder / "prompts.jsonl"), loss="forward_kl", epochs=3.0, batch_size=8, held_out=2, seed=6
    )
    whole = distill.run_with({**wanted, "runs": str(folder / "whole")})
    real, step = module.Supervised, Trainer.step

    def dying(self: Trainer, examples: Any) -> dict[str, float]:
        if self.num_steps == 5:
            raise KeyboardInterrupt
        return step(self, examples)

    monkeypatch.setattr(Trainer, "step", dying)
    monkeypatch.setattr(module, "Supervised", lambda **given: real(**{**given, "checkpoint_every": 2}))
    with pytest.raises(KeyboardInterrupt):
        distill.run_with({**wanted, "runs": str(folder / "killed")})
    monkeypatch.undo()
    (cut,) = (path.parent for path in (folder / "killed").glob("*/run.json"))
    resumed = distill.run_with({**wanted, "runs": str(folder / "killed"), "resume": str(cut)})
    one, two = (models.load(run / "model").state_dict() for run in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [[row["loss"] for row in metrics_of(run) if "loss" in row] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 5, "or the kill came after the end"


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["policy", "reverse_kl", "jsd"])
def test_on_policy_comes_near_the_teacher(bench: Workbench, tmp_path: Path, loss: str) -> None:
    """A student that guesses among four answers, and a teacher that nearly knows which."""
    words = ("yes", "no", "perhaps", "never")
    lines = [{"prompt": task.prompt, "completion": word} for task in TASKS for word in words]
    student, teacher = teach(make(tmp_path / "s", 0), lines, 50), teach(make(tmp_path / "t", 0), lines, 50)
    teach(teacher, [line for line in lines if line["completion"] == "yes"], 6)
    config = OnPolicy.from_dict(
        {
            "steps": 24,
            "prompts_per_step": 6,
            "samples": 8,
            "max_tokens": 10,
            "loss": loss,
            "lr": 2e-3,
            "dtype": "float32",
        }
    )
    asyncio.run(on_policy_loop(bench, student, teacher, TASKS, config))
    rows = metrics_of(bench.run.path)
    name = "reverse_kl" if loss == "policy" else "divergence"
    first = sum(row[name] for row in rows[:3]) / 3
    last = sum(row[name] for row in rows[-3:]) / 3
    assert last < 0.5 * first, (first, last)
    assert all(row["on_policy"] == 1.0 for row in rows)


def test_a_teacher_that_is_the_student_gives_no_credit(bench: Workbench, tmp_path: Path) -> None:
    student, teacher = make(tmp_path / "s", 0), make(tmp_path / "t", 0)
    config = OnPolicy(steps=1, prompts_per_step=4, max_tokens=6, dtype="float32")
    metrics = asyncio.run(on_policy_loop(bench, student, teacher, TASKS, config))
    assert metrics["reverse_kl"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(0.0, abs=1e-3)


def test_on_policy_recipe_mixes_in_data_and_goes_on_after_its_end(folder: Path) -> None:
    wanted = options(
        folder,
        data=str(folder / "pairs.jsonl"),
        loss="forward_kl",
        on_policy=0.5,
        steps=8,
        prompts_per_step=2,
        samples=2,
        seed=1,
    )
    run = on_policy_distill.run_with(wanted)
    kinds = [row["on_policy"] for row in metrics_of(run)]
    assert set(kinds) == {0.0, 1.0}
    weights = models.load(run / "model").embed.weight.clone()
    on_policy_distill.run_with({**wanted, "resume": str(run)})
    torch.testing.assert_close(models.load(run / "model").embed.weight, weights, atol=0, rtol=0)
    with pytest.raises(UsageError, match="on_policy below 1"):
        on_policy_distill.run_with({**wanted, "loss": "policy"})


def test_the_policy_gradient_points_where_the_full_reverse_kl_does(bench: Workbench, tmp_path: Path) -> None:
    """Many one-token samples: the advantages' gradient is that of KL(student ‖ teacher), up to noise."""
    student, teacher = make(tmp_path / "s", 0, sharp=3.0), make(tmp_path / "t", 1, sharp=3.0)
    prompt = student.renderer.prompt(TASKS[0])
    log_q = student.model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    log_p = teacher.model(torch.tensor([prompt]))[0, -1].log_softmax(-1).detach()
    (log_q.exp() * (log_q - log_p)).sum().backward()
    exact = torch.cat([weight.grad.flatten() for weight in student.model.parameters()])  # type: ignore[union-attr]
    student.model.zero_grad()
    from posttrain.rollout import to_examples
    from posttrain.train import policy_objective

    with student.engine(slots=256, length=64, inline=True) as engine:
        groups = asyncio.run(
            run_groups(
                engine,
                TASKS[:1],
                Sampling(n=4096, max_tokens=1, ignore_eos=True),
                prompt_tokens=student.renderer.prompt,
                seed=0,
            )
        )
    scorer = Scorer(teacher, micro_tokens=8192, dtype="float32", temperature=1.0)
    advantages = asyncio.run(scorer.advantages(groups, None))
    trainer = Trainer(student.model, TrainConfig(lr=0.0, max_grad_norm=0.0), policy_objective())
    taken: list[torch.Tensor] = []
    update = trainer._optimiser.step

    def step(lr: float) -> None:
        taken.extend(weight.grad.flatten().clone() for weight in student.model.parameters())  # type: ignore[union-attr]
        update(lr)

    trainer._optimiser.step = step  # type: ignore[method-assign]
    trainer.step(to_examples(groups, advantages))
    cosine = torch.nn.functional.cosine_similarity(torch.cat(taken), exact, dim=0).item()
    assert cosine > 0.9, cosine
