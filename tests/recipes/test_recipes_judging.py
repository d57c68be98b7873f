"""Judges from the command line, calibration as a recipe, people through the feedback store, groups as a stream."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import ConfigError, DataError, EvaluateError, Feedback, Sampling, Task, UsageError, user
from posttrain.engine import RemoteChat, ScriptedEngine
from posttrain.evaluate import JudgeCalibration
from posttrain.feedback import FeedbackStore
from posttrain.grade import (
    BinaryJudge,
    ConstitutionJudge,
    PairwiseJudge,
    People,
    RagJudge,
    RubricJudge,
    ScaleJudge,
    TemplateJudge,
    grade_all,
    prove,
    trajectory_from_text,
)
from posttrain.recipes.grading import grader_from
from posttrain.recipes.group_stream import stream_groups
from posttrain.recipes.judge_calibration import judge_calibration
from posttrain.recipes.judge_labels import read_labels
from posttrain.recipes.people import StoreGrades, interaction_id
from posttrain.rollout import run_groups


class FakeServer(ThreadingHTTPServer):
    """A chat server whose model finds answers right that hold a 2, and prefers those."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Completions)
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.refuses_schemas = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Completions(BaseHTTPRequestHandler):
    server: FakeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        if self.server.refuses_schemas and "response_format" in body:
            self._reply(400, {"error": "response_format is not known"})
            return
        asked = body["messages"][-1]["content"]
        if '"better"' in asked:
            first = asked.split("<<<answer A")[1].split("<<<end")[0]
            second = asked.split("<<<answer B")[1].split("<<<end")[0]
            better = "tie" if ("right" in first) == ("right" in second) else "A" if "right" in first else "B"
            verdict: dict[str, Any] = {"rationale": "r", "better": better}
        else:
            answer = asked.split("<<<answer")[1].split("<<<end")[0].split(">>>")[1]
            verdict = {"rationale": "r", "meets": "2" in answer}
        message = {"role": "assistant", "content": json.dumps(verdict)}
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        self._reply(200, {"choices": [{"message": message}], "usage": usage})

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FakeServer]:
    running = FakeServer()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


TASK = Task(id="sum", prompt="1 + 1?", answer="2")


def test_a_served_judge_on_the_command_line(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    criteria = tmp_path / "criteria.toml"
    cache = tmp_path / "judge.db"
    criteria.write_text(
        'criteria = "The answer holds the number two."\napi_key_env = "JUDGE_KEY"\n'
        "price_input = 1.0\nprice_output = 2.0\n"
        f'max_dollars = 1.0\ncache = "{cache}"\n'
        '[[shots]]\nprompt = "2 + 2?"\nanswer = "5"\nverdict = false\n'
        '[[cases]]\nprompt = "1 + 1?"\ntext = "2"\nlow = 1\nhigh = 1\n'
        '[[cases]]\nprompt = "1 + 1?"\ntext = "3"\nlow = 0\nhigh = 0\n'
    )
    word = f"judge:{server.url}#some/model:8b,{criteria}"
    with pytest.raises(UsageError, match="JUDGE_KEY"):
        grader_from(word)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    grader = grader_from(word)
    assert prove(grader).problems == ()
    (grade,) = asyncio.run(grade_all(grader, [trajectory_from_text(TASK, "It is 2.")]))
    assert grade.score == 1.0
    assert grade.cost == pytest.approx(100e-6 + 20e-6)
    body = server.bodies[-1]
    assert body["model"] == "some/model:8b"
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["rationale", "meets"]
    assert server.keys[-1] == "Bearer secret"
    asked = len(server.bodies)
    (again,) = asyncio.run(grade_all(grader_from(word), [trajectory_from_text(TASK, "It is 2.")]))
    assert (again.score, again.cost, len(server.bodies)) == (1.0, 0.0, asked)  # from the cache


def test_a_server_without_structured_output_is_asked_without_it(server: FakeServer) -> None:
    server.refuses_schemas = True
    chat = RemoteChat(server.url, "m")

    async def go() -> None:
        for _ in range(2):
            message, used = await chat.chat_structured(
                [user("<<<answer x>>> 2 <<<end")], Sampling(), {"type": "object"}
            )
            assert "meets" in message.content
            assert used == {"prompt_tokens": 100, "completion_tokens": 10}
        await chat.close()

    asyncio.run(go())
    assert ["response_format" in body for body in server.bodies] == [True, False, False]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ("", BinaryJudge),
        ('kind = "scale"\nhigh = 10\n[anchors]\n1 = "bad"\n10 = "good"', ScaleJudge),
        ('kind = "template"\ntemplate = "{answer}"\npattern = "(\\\\d)"\nlow = 0\nhigh = 9', TemplateJudge),
        ('kind = "pairwise"\nswap = false', PairwiseJudge),
        ('kind = "rubric"', RubricJudge),
        ('kind = "constitution"\nprinciples = ["a", "b"]\nper_call = 1', ConstitutionJudge),
        ('kind = "rag"', RagJudge),
    ],
)
def test_every_kind_from_a_file(tmp_path: Path, settings: str, kind: type) -> None:
    path = tmp_path / "judge.toml"
    path.write_text(settings)
    assert type(grader_from(f"judge:http://127.0.0.1:1#m,{path}")) is kind


def test_words_and_files_that_are_no_judge(tmp_path: Path) -> None:
    for word in ("judge:", "judge:127.0.0.1#m", "judge:http://127.0.0.1"):
        with pytest.raises(UsageError, match="URL#MODEL"):
            grader_from(word)
    path = tmp_path / "judge.toml"
    path.write_text('kid = "binary"')
    with pytest.raises(ConfigError, match="unknown field `kid`"):
        grader_from(f"judge:http://127.0.0.1:1#m,{path}")
    with pytest.raises(ConfigError, match="no such configuration file"):
        grader_from("judge:http://127.0.0.1:1#m,nowhere.toml")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_calibration_of_a_judge_of_pairs(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for number in range(12):
        a, b = ("right", "wrong") if number % 2 else ("wrong", "right")
        votes = ["b", "a"][number % 2] * 2 + ("a" if number == 0 else "")
        rows.append({"prompt": f"q{number}", "a": a, "b": b, "votes": list(votes)})
    data = write(tmp_path / "pairs.jsonl", rows)
    criteria = tmp_path / "pairs.toml"
    criteria.write_text('kind = "pairwise"')
    report = judge_calibration(data=data, judge=f"judge:{server.url}#m,{criteria}", runs=tmp_path / "runs")
    assert report.metrics["agreement_majority"].value == 1.0
    assert report.metrics["flip_rate"].value == 0.0
    assert len(server.bodies) == 24
    said = capsys.readouterr().out
    assert "agreement_majority" in said
    (path,) = (tmp_path / "runs").glob("*/report.json")
    assert JudgeCalibration.from_json(path.read_bytes()) == report
    assert len((path.parent / "verdicts.jsonl").read_text().splitlines()) == 12


def test_calibration_of_a_judge_of_answers_and_of_the_longer_one(server: FakeServer, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{n}", "answer": f"it is {2 if n % 3 else 5}", "reference": "2", "label": n % 3 > 0}
        for n in range(12)
    ]
    data = write(tmp_path / "answers.jsonl", rows)
    report = judge_calibration(data=data, judge=f"judge:{server.url}#m", runs=tmp_path / "runs")
    assert report.errors is not None
    assert (report.errors.specificity, report.errors.sensitivity) == (1.0, 1.0)
    assert report.num_failed == 0
    pairs = write(
        tmp_path / "pairs.jsonl", [{"prompt": f"q{n}", "a": "xx", "b": "x", "votes": ["a"]} for n in range(4)]
    )
    longer = judge_calibration(data=pairs, judge="longer", runs=tmp_path / "runs")
    assert longer.metrics["agreement"].value == 1.0
    pairwise = tmp_path / "pairs.toml"
    pairwise.write_text('kind = "pairwise"')
    with pytest.raises(UsageError, match="compares two"):
        judge_calibration(data=data, judge=f"judge:{server.url}#m,{pairwise}", runs=tmp_path / "runs")


def test_labels_that_are_none(tmp_path: Path) -> None:
    for rows, said in (
        ([{"prompt": "q", "text": "x"}], "no human labels that are known"),
        ([{"prompt": "q", "a": "x", "b": "y", "votes": ["c"]}], "votes must be a, b or tie"),
        ([{"a": "x", "b": "y", "votes": ["a"]}], "no prompt"),
        ([{"prompt": "q", "answer": "x", "votes": [3]}], "true or false"),
        (
            [{"prompt": "q", "answer": "x", "label": True}, {"prompt": "q", "a": "x", "b": "y", "votes": ["a"]}],
            "two files",
        ),
        ([], "the file is empty"),
    ):
        with pytest.raises(DataError, match=said):
            read_labels(write(tmp_path / "rows.jsonl", rows))
    known = write(tmp_path / "known.jsonl", [{"input": "q", "output_1": "x", "output_2": "y", "label": 2}])
    (pair,) = read_labels(known)
    assert pair.votes == ("b",)


def test_one_row_gives_no_interval_and_says_so(tmp_path: Path) -> None:
    data = write(tmp_path / "one.jsonl", [{"prompt": "q", "a": "xx", "b": "y", "votes": []}])
    with pytest.raises(EvaluateError, match="no pair has a vote"):
        judge_calibration(data=data, judge="longer", runs=tmp_path / "runs")


def signal(
    completion: str, id: str, value: Any, source: str, kind: Any = "thumb", created_s: float = 0.0, **more: Any
) -> Feedback:
    return Feedback(id=id, completion_id=completion, kind=kind, value=value, source=source, created_s=created_s, **more)


def test_people_grade_through_the_feedback_store(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "feedback.db")
    trajectory = trajectory_from_text(TASK, "It is 2.", id="sum/0/1")
    name = interaction_id(trajectory)
    people = People(StoreGrades(store), min_people=2, wait_s=30.0, every_s=0.02)

    async def go() -> Any:
        grading = asyncio.ensure_future(people.grade(trajectory))
        while store.interaction(name) is None:
            await asyncio.sleep(0.01)
        store.add(signal(name, "1", False, "ann"))
        store.add(signal(name, "2", True, "ann", created_s=1.0))  # changed her mind
        store.add(signal(name, "3", 2.0, "bob", kind="rating", comment="so so"))
        return await grading

    grade = asyncio.run(go())
    assert grade.score == pytest.approx((1.0 + 0.25) / 2)
    assert grade.rationale == "bob: so so"
    logged = store.interaction(name)
    assert logged is not None
    assert (logged.text, logged.metadata["task_id"]) == ("It is 2.", "sum")
    only_bob = StoreGrades(store, people=["bob"])
    assert [each.person for each in asyncio.run(only_bob.grades_of(trajectory))] == ["bob"]
    asyncio.run(only_bob.ask_for(trajectory))  # again, as a resumed run does: nothing changes
    assert store.counts().interactions == 1
    other = trajectory_from_text(TASK, "It is 3.", id="sum/0/1")  # another run's answer of the same name
    asyncio.run(only_bob.ask_for(other))
    assert asyncio.run(only_bob.grades_of(other)) == []


def test_a_label_can_be_the_grade(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "feedback.db")
    source = StoreGrades(store, label="solved")
    trajectory = trajectory_from_text(TASK, "2")
    asyncio.run(source.ask_for(trajectory))
    store.add(signal(interaction_id(trajectory), "1", True, "ann", kind="label", name="solved"))
    store.add(signal(interaction_id(trajectory), "2", 0.5, "bob", kind="label", name="other"))
    assert [each.score for each in asyncio.run(source.grades_of(trajectory))] == [1.0]


def test_groups_come_one_by_one_and_are_those_of_a_whole_step(tiny_policy: Any) -> None:
    tasks = [Task(id=str(n), prompt=f"p{n}") for n in range(4)]
    sampling = Sampling(max_tokens=6, n=2)

    async def go() -> tuple[list[Any], list[Any]]:
        with tiny_policy.engine(slots=8, length=64) as engine:
            options = {"prompt_tokens": tiny_policy.renderer.prompt, "seed": 3, "step": 1}
            whole = await run_groups(engine, tasks, sampling, **options)
            stream = [group async for group in stream_groups(engine, tasks, sampling, **options)]
            return whole, stream

    whole, stream = asyncio.run(go())
    by_id = {group.id: group for group in stream}
    assert set(by_id) == {group.id for group in whole}
    for group in whole:
        assert [t.tokens for t in group.trajectories] == [t.tokens for t in by_id[group.id].trajectories]


def test_leaving_a_stream_of_groups_cancels_the_rest(tiny_policy: Any) -> None:
    tasks = [Task(id=str(n), prompt=f"p{n}") for n in range(3)]
    engine = ScriptedEngine(lambda request: "x", tiny_policy.tokenizer, latency_s=0.01)

    async def go() -> int:
        options = {"prompt_tokens": tiny_policy.renderer.prompt, "seed": 0}
        stream = stream_groups(engine, tasks, Sampling(max_tokens=4), **options)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        return len([task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()])

    assert asyncio.run(go()) <= 3  # cancelled, and gone with the loop
