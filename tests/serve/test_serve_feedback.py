"""Feedback over HTTP, and from there to a data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from posttrain import data, feedback, serve
from posttrain.feedback import FeedbackStore

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def client(server: serve.Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer key-a"}) as opened:
        yield opened


def ask(client: httpx.Client, **change: Any) -> str:
    answer = client.post("/v1/chat/completions", json={**CHAT, **change})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def test_each_signal_is_stored_and_read_back(client: httpx.Client, store: FeedbackStore) -> None:
    completion = ask(client, n=2)
    signals = [
        ({"thumb": "up"}, True),
        ({"thumb": False}, False),
        ({"rating": 4}, 4.0),
        ({"correction": "better"}, "better"),
        ({"label": {"name": "resolved", "value": True}}, True),
        ({"preferred": True, "rejected": {"choice": 1}}, None),
        ({"preferred": "tie_bad", "rejected": {"choice": 1}}, "tie_bad"),
    ]
    for signal, value in signals:
        answer = client.post("/v1/feedback", json={"completion_id": completion, "source": "ann", **signal})
        assert answer.status_code == 201, answer.text
        assert answer.json()["value"] == value
    found = client.get(f"/v1/feedback/{completion}").json()["data"]
    assert [item["value"] for item in found] == [value for _, value in signals]
    assert found[4]["name"] == "resolved"
    assert found[5]["rejected_choice"] == 1
    assert store.counts().kinds == {"thumb": 2, "rating": 1, "correction": 1, "label": 1, "preferred": 2}


def test_unknown_and_foreign_completions_are_404(client: httpx.Client, server: serve.Server) -> None:
    completion = ask(client)
    for body in ({"completion_id": "chatcmpl-none"}, {"completion_id": completion, "choice": 1}):
        assert client.post("/v1/feedback", json={**body, "thumb": True}).status_code == 404
    rejected = {"completion_id": completion, "preferred": True, "rejected": {"completion_id": "none"}}
    assert client.post("/v1/feedback", json=rejected).status_code == 404
    assert client.get("/v1/feedback/none").status_code == 404
    other = {"Authorization": "Bearer key-b"}
    foreign = client.post("/v1/feedback", json={"completion_id": completion, "thumb": True}, headers=other)
    unknown = client.post("/v1/feedback", json={"completion_id": "x", "thumb": True}, headers=other)
    assert foreign.status_code == 404
    assert foreign.json()["error"]["message"].replace(completion, "x") == unknown.json()["error"]["message"]
    assert client.get(f"/v1/feedback/{completion}", headers=other).status_code == 404
    admin = {"Authorization": "Bearer root"}
    assert (
        client.post("/v1/feedback", json={"completion_id": completion, "thumb": True}, headers=admin).status_code == 201
    )


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"thumb": True, "rating": 3},
        {"thumb": None},
        {"thumb": "sideways"},
        {"rating": "good"},
        {"correction": ""},
        {"label": {"name": "", "value": 1}},
        {"label": {"name": "x"}},
        {"preferred": True},
        {"preferred": False, "rejected": {"choice": 1}},
        {"preferred": True, "rejected": {"choice": 0}},
        {"thumb": True, "rejected": {}},
        {"thumb": True, "choice": -1},
        {"thumb": True, "extra": 1},
        {"thumb": True, "source": ""},
    ],
)
def test_wrong_signals_are_400(client: httpx.Client, store: FeedbackStore, body: dict[str, Any]) -> None:
    completion = ask(client, n=2)
    answer = client.post("/v1/feedback", json={"completion_id": completion, **body})
    assert answer.status_code == 400, answer.text
    assert store.counts().feedback == 0


def test_without_a_store_there_is_no_feedback(model: serve.ServedModel) -> None:
    with serve.Server(serve.create_app({"tiny": model})) as server:
        answer = httpx.post(server.url + "/v1/feedback", json={"completion_id": "x", "thumb": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "feedback_disabled")


def test_from_answers_to_a_data_set_over_a_restart(model: serve.ServedModel, tmp_path: Path) -> None:
    path = tmp_path / "flywheel.db"
    with FeedbackStore(path) as store:
        server = serve.Server(serve.create_app({"tiny": model}, store=store)).start()
        with server, httpx.Client(base_url=server.url) as client:
            liked, edited = ask(client), ask(client, n=2, messages=[{"role": "user", "content": "mail me@x.org"}])
    with FeedbackStore(path) as store:
        server = serve.Server(serve.create_app({"tiny": model}, store=store)).start()
        with server, httpx.Client(base_url=server.url) as client:
            for body in (
                {"completion_id": liked, "thumb": True},
                {"completion_id": edited, "correction": "write to me@x.org"},
                {"completion_id": edited, "choice": 1, "thumb": False},
            ):
                assert client.post("/v1/feedback", json=body).status_code == 201
        assert store.counts().interactions == 3
        reports = {
            kind: feedback.export(store, kind, out=tmp_path / f"{kind}.jsonl")
            for kind in ("prompt_completion", "preference", "unpaired_preference")
        }
    assert {kind: report.rows for kind, report in reports.items()} == {
        "prompt_completion": 2,
        "preference": 1,
        "unpaired_preference": 2,
    }
    completions = data.load(tmp_path / "prompt_completion.jsonl", kind="completion")
    assert [row.completion[0].content for row in completions] == ["echo <user>hi<assistant>", "write to [EMAIL]"]
    (pair,) = data.load(tmp_path / "preference.jsonl", kind="preference")
    assert pair.prompt[0].content == "mail [EMAIL]"
    labels = data.load(tmp_path / "unpaired_preference.jsonl", kind="unpaired")
    assert [row.label for row in labels] == [True, False]
