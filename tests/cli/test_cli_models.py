"""`posttrain evaluate`, `generate` and `serve` on a tiny model."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from posttrain.cli import serve as serving

PROMPT = "two and two is"


def test_generate_prints_the_answer_and_the_same_seed_gives_it_again(
    posttrain: Callable[..., Any], tiny_model: Path
) -> None:
    words = ("generate", "--model", tiny_model, "--prompt", PROMPT, "--max-tokens", 8, "--seed", 3)
    once = posttrain(*words)
    assert once.code == 0
    assert once.out.strip()
    assert posttrain(*words).out == once.out
    assert posttrain(*words, "--stream").out == once.out


def test_generate_many_as_json_with_logprobs(posttrain: Callable[..., Any], tiny_model: Path) -> None:
    said = posttrain(
        *("generate", "--model", tiny_model, "--prompt", PROMPT, "three", "--n", 2, "--seed", 1, "--max-tokens", 4),
        *("--temperature", 0.7, "--top-k", 20, "--logprobs", "--json"),
    )
    answers = said.json()
    assert [(answer["prompt"], answer["index"]) for answer in answers] == [
        (PROMPT, 0),
        (PROMPT, 1),
        ("three", 0),
        ("three", 1),
    ]
    for answer in answers:
        assert (
            answer["num_tokens"] == len(answer["tokens"]) == len(answer["logprobs"]) == len(answer["policy_logprobs"])
        )
        assert answer["stop_reason"] in ("eos", "length")
        assert max(answer["logprobs"]) <= 0
    table = posttrain("generate", "--model", tiny_model, "--prompt", PROMPT, "--max-tokens", 3, "--logprobs").out
    assert "id\ttoken\tlogprob" in table


def test_generate_reads_files_and_standard_input(
    posttrain: Callable[..., Any],
    tiny_model: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("generate", "--model", tiny_model, "--max-tokens", 2, "--temperature", 0, "--json")
    file = write_rows("prompts.jsonl", [{"question": PROMPT, "answer": "four"}, {"question": "hello", "answer": "hi"}])
    from_file = posttrain(*words, "--file", file).json()
    assert [answer["prompt"] for answer in from_file] == [PROMPT, "hello"]
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert posttrain(*words).json() == from_file[:1]
    chat = posttrain(*words, "--prompt", PROMPT, "--chat").json()
    assert chat[0]["prompt"][0]["content"] == PROMPT
    assert chat[0]["num_prompt_tokens"] > from_file[0]["num_prompt_tokens"]


def test_generate_refuses_what_cannot_be(
    posttrain: Callable[..., Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = posttrain("generate", "--model", tmp_path / "absent", "--prompt", "x")
    assert (absent.code, "no such model folder" in absent.err) == (1, True)
    long = posttrain("generate", "--model", tiny_model, "--prompt", "x", "--max-tokens", 500)
    assert (long.code, "lower max_tokens" in long.err) == (1, True)
    hot = posttrain("generate", "--model", tiny_model, "--prompt", "x", "--temperature", -1)
    assert (hot.code, "temperature must be 0 or more" in hot.err) == (2, True)
    both = posttrain("generate", "--model", tiny_model, "--prompt", "x", "--stream", "--json")
    assert (both.code, "leave out --json" in both.err) == (2, True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    nothing = posttrain("generate", "--model", tiny_model)
    assert (nothing.code, "give --prompt" in nothing.err) == (2, True)


def test_evaluate_takes_the_recipes_options(
    posttrain: Callable[..., Any], tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    tasks = write_rows("sums.jsonl", [{"prompt": f"{one} and one is", "answer": "x"} for one in range(4)])
    words = ("--model", tiny_model, "--data", tasks, "--max-tokens", "4", "--runs", tmp_path / "runs")
    said = posttrain("evaluate", *words, "--json")
    assert said.code == 0
    report = said.json()
    assert (report["suite"], len(report["samples"])) == ("sums", 4)
    assert report["metrics"]["accuracy"]["value"] == 0.0
    (run,) = posttrain("runs", "--runs", tmp_path / "runs", "--json").json()
    assert (run["recipe"], run["status"], run["accuracy"]) == ("evaluate", "finished", 0.0)
    assert "has no option --modl; did you mean --model?" in posttrain("evaluate", "--modl", "x").err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def while_serving(url: str, work: Callable[[httpx.Client], None]) -> threading.Thread:
    """Wait for the server of this process, do some work with it, and end it as Ctrl-C does."""
    failures: list[BaseException] = []

    def visit() -> None:
        try:
            with httpx.Client(base_url=url, timeout=60, headers={"Authorization": "Bearer secret"}) as client:
                deadline = time.monotonic() + 60
                while True:
                    try:
                        if client.get("/ready").status_code == 200:
                            break
                    except httpx.TransportError:
                        if time.monotonic() > deadline:
                            raise
                    time.sleep(0.05)
                work(client)
        except BaseException as error:  # noqa: BLE001  raised again in the test's thread
            failures.append(error)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=visit)
    thread.failures = failures  # type: ignore[attr-defined]
    thread.start()
    return thread


def test_serve_answers_logs_and_ends_cleanly(
    posttrain: Callable[..., Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.registry import Gate, Registry

    runs = tmp_path / "runs"
    with Registry(runs / "registry.db") as registry:
        card = registry.card(registry.add_artifact(tiny_model, kind="model", name="shop/base").id)
        registry.promote("shop", card, gate=Gate(), force=True, reason="a test needs a champion")
    monkeypatch.setenv(serving.KEY_VARIABLE, "secret")
    port = free_port()
    answers: list[Any] = []

    def ask(client: httpx.Client) -> None:
        body = {"model": "shop", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4, "seed": 1}
        answers.append(client.post("/v1/chat/completions", json=body).raise_for_status().json())
        assert client.post("/v1/chat/completions", json=body, headers={"Authorization": "Bearer x"}).status_code == 401

    visitor = while_serving(f"http://127.0.0.1:{port}", ask)
    said = posttrain("serve", "--project", "shop", "--runs", runs, "--port", port)
    visitor.join()
    assert visitor.failures == []  # type: ignore[attr-defined]
    assert said.code == 0
    assert f"serving shop on http://127.0.0.1:{port}\n" in said.out
    assert f"curl -sS http://127.0.0.1:{port}/v1/chat/completions -H" in said.out
    assert "stopped" in said.out
    (row,) = posttrain("feedback", "list", "--db", runs / "feedback.db", "--json").json()
    assert row["interaction"]["id"] == answers[0]["id"]
    assert row["interaction"]["model"] == card.id


def test_serve_refuses_an_open_address_without_a_key(
    posttrain: Callable[..., Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(serving.KEY_VARIABLE, raising=False)
    said = posttrain("serve", "--model", tiny_model, "--host", "0.0.0.0", "--runs", tmp_path)
    assert (said.code, serving.KEY_VARIABLE in said.err) == (2, True)
    assert posttrain("serve", "--runs", tmp_path).code == 2
    nowhere = posttrain("serve", "--project", "shop", "--runs", tmp_path)
    assert (nowhere.code, "no registry here" in nowhere.err) == (1, True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = posttrain("serve", "--model", tiny_model, "--port", taken.getsockname()[1], "--runs", tmp_path)
    assert (said.code, "Choose another port" in said.err, said.out) == (1, True, "")


def test_a_served_folder_is_known_by_its_card_while_it_is_what_was_registered(own_model: Path, tmp_path: Path) -> None:
    from posttrain.registry import Registry

    assert serving.registered_id(own_model, tmp_path) == ""
    with Registry(tmp_path / "registry.db") as registry:
        made = registry.add_artifact(own_model, kind="model", name="mine", storage="reference")
    assert serving.registered_id(own_model, tmp_path) == made.id
    (own_model / "config.json").write_text((own_model / "config.json").read_text() + " ")
    assert serving.registered_id(own_model, tmp_path) == ""


@pytest.mark.parametrize(
    ("host", "closed"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_addresses(host: str, closed: bool) -> None:
    assert serving.is_loopback(host) is closed


def test_the_curl_line_can_be_copied() -> None:
    _, line = serving.welcome("http://127.0.0.1:8000", "o'model", has_key=True, chat=False)
    assert line.startswith(
        'curl -sS http://127.0.0.1:8000/v1/completions -H "Authorization: Bearer $POSTTRAIN_API_KEY"'
    )
    import shlex

    assert json.loads(shlex.split(line)[-1]) == {"model": "o'model", "max_tokens": 64, "prompt": "Hello"}
