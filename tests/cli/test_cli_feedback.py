"""`posttrain feedback`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import Interaction, Sampling, StopReason, user
from posttrain.feedback import FeedbackStore


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "feedback.db"
    with FeedbackStore(path) as opened:
        opened.log_many(
            Interaction(
                id=f"chatcmpl-{number}",
                choice=0,
                model="card",
                model_name="shop",
                messages=(user(f"question {number}? Write to me@example.com"),),
                prompt=f"question {number}",
                prompt_tokens=(1, 2),
                tokens=(3,),
                logprobs=(-0.5,),
                text=f"answer {number}",
                stop_reason=StopReason.EOS,
                sampling=Sampling(),
                created_s=1.7e9 + number,
            )
            for number in range(3)
        )
    return path


def test_signals_are_added_listed_and_counted(posttrain: Callable[..., Any], store: Path) -> None:
    for number, words in enumerate(
        (["--thumb", "up"], ["--rating", "2"], ["--correction", "answer two"], ["--label", "resolved=true"])
    ):
        said = posttrain("feedback", "add", f"chatcmpl-{number % 3}", *words, "--source", "anna", "--db", store)
        assert (said.code, "stored fb-" in said.out) == (0, True)
    assert posttrain("feedback", "add", "chatcmpl-0", "--thumb", "down", "--source", "ben", "--db", store).code == 0
    lines = posttrain("feedback", "list", "--db", store).out.splitlines()
    assert [line.split("\t")[-1] for line in lines[1:]] == [
        "thumb up (anna), resolved=True (anna), thumb down (ben)",
        "rating 2 (anna)",
        "correction 'answer two' (anna)",
    ]
    newest = posttrain("feedback", "list", "--limit", 1, "--db", store, "--json").json()
    assert [row["interaction"]["id"] for row in newest] == ["chatcmpl-2"]
    assert posttrain("feedback", "list", "--model", "other", "--db", store, "--json").json() == []
    counts = posttrain("feedback", "counts", "--db", store, "--json").json()
    assert (counts["interactions"], counts["feedback"], counts["kinds"]["thumb"]) == (3, 5, 2)
    assert counts["agreement"][0]["sources"] == ["anna", "ben"]
    assert "3 answers, 5 signals" in posttrain("feedback", "counts", "--db", store).out


@pytest.mark.parametrize(
    ("text", "name", "value"), [("ok=true", "ok", True), ("stars=4.5", "stars", 4.5), ("why=a=b", "why", "a=b")]
)
def test_labels(posttrain: Callable[..., Any], store: Path, text: str, name: str, value: object) -> None:
    assert posttrain("feedback", "add", "chatcmpl-0", "--label", text, "--db", store).code == 0
    with FeedbackStore(store) as opened:
        (signal,) = opened.feedback_for("chatcmpl-0")
    assert (signal.kind, signal.name, signal.value) == ("label", name, value)


def test_export_writes_redacted_rows(posttrain: Callable[..., Any], store: Path, tmp_path: Path) -> None:
    posttrain("feedback", "add", "chatcmpl-0", "--thumb", "up", "--db", store)
    posttrain("feedback", "add", "chatcmpl-1", "--correction", "better", "--db", store)
    posttrain("feedback", "add", "chatcmpl-2", "--thumb", "down", "--db", store)
    out = tmp_path / "rows.jsonl"
    said = posttrain("feedback", "export", "--out", out, "--db", store)
    assert said.code == 0
    assert f"2 rows in {out}" in said.out
    assert "redacted: 2 × EMAIL" in said.out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["completion"][0]["content"] for row in rows] == ["answer 0", "better"]
    assert "me@example.com" not in out.read_text()
    report = posttrain(
        *("feedback", "export", "--kind", "unpaired_preference", "--out", out, "--db", store),
        *("--no-redact", "--format", "standard", "--json"),
    ).json()
    assert (report["rows"], report["redactions"]) == (2, {})
    assert [json.loads(line)["label"] for line in out.read_text().splitlines()] == [True, False]


def test_errors(posttrain: Callable[..., Any], store: Path, tmp_path: Path) -> None:
    unknown = posttrain("feedback", "add", "chatcmpl-9", "--thumb", "up", "--db", store)
    assert (unknown.code, "no completion 'chatcmpl-9'" in unknown.err) == (1, True)
    assert posttrain("feedback", "add", "chatcmpl-0", "--db", store).code == 2
    assert "write NAME=VALUE" in posttrain("feedback", "add", "chatcmpl-0", "--label", "resolved", "--db", store).err
    absent = posttrain("feedback", "list", "--db", tmp_path / "absent.db")
    assert (absent.code, "no feedback store here" in absent.err) == (1, True)
    assert not (tmp_path / "absent.db").exists()
