"""Rewards over HTTP: the wire, patience, limits, and where requests may not go."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from posttrain.core import ConfigError, Grade, Task
from posttrain.grade import HttpReward, UrlGuard, UrlRefused, grade_all, trajectory_from_text

PUBLIC = "93.184.215.14"
URL = "https://reward.example/score"
Handler = Callable[[httpx.Request], httpx.Response]


def resolver(*addresses: str) -> Callable[[str, int], Any]:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return resolve


def reward(handler: Handler, **options: Any) -> HttpReward:
    settings: dict[str, Any] = {"resolve": resolver(PUBLIC), "first_wait_s": 0.001, **options}
    return HttpReward(URL, transport=httpx.MockTransport(handler), **settings)


def graded(grader: HttpReward, *texts: str, **options: Any) -> list[Grade]:
    task = Task(id="t", prompt="the prompt", answer="ref", facts={"secret": 1})
    trajectories = [trajectory_from_text(task, text, id=f"t/{n}") for n, text in enumerate(texts)]
    return asyncio.run(grade_all(grader, trajectories, **options))


def by_length(request: httpx.Request) -> httpx.Response:
    items = json.loads(request.content)["items"]
    grades = [{"id": item["id"], "score": len(item["answer"]), "parts": {"words": 1}} for item in reversed(items)]
    return httpx.Response(200, json={"grades": grades})


def test_answers_travel_together_and_come_back_in_order() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return by_length(request)

    grades = graded(
        reward(handler, batch_size=4, gather_s=0.2, headers={"Authorization": "Bearer x"}),
        *("x" * n for n in range(1, 11)),
    )
    assert [grade.score for grade in grades] == [float(n) for n in range(1, 11)]
    assert grades[0].parts == {"words": 1.0}
    assert sorted(len(json.loads(request.content)["items"]) for request in seen) == [2, 4, 4]
    first = seen[0]
    assert (first.url.host, first.headers["host"], first.headers["authorization"]) == (
        PUBLIC,
        "reward.example",
        "Bearer x",
    )
    assert first.extensions["sni_hostname"] == "reward.example"
    body = json.loads(first.content)
    assert body["version"] == "posttrain-reward/1"
    item = body["items"][0]
    assert (item["prompt"], item["reference"], item["facts"]) == ("the prompt", "ref", {"secret": 1})


def test_facts_stay_here_where_asked() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content)["items"][0]["facts"] == {}
        return by_length(request)

    assert graded(reward(handler, send_facts=False), "abc")[0].score == 3.0


def test_passing_failures_are_tried_again() -> None:
    answers: list[Any] = [
        httpx.Response(503),
        httpx.ConnectError("gone"),
        httpx.Response(429, headers={"retry-after": "0"}),
    ]

    def handler(request: httpx.Request) -> httpx.Response:
        if answers:
            now = answers.pop(0)
            if isinstance(now, Exception):
                raise now
            return now
        return by_length(request)

    assert graded(reward(handler, retries=3), "abc", deadline_s=30)[0].score == 3.0
    assert not answers


@pytest.mark.parametrize(
    ("handler", "said", "attempts"),
    [
        (lambda r: httpx.Response(500, text="oh no"), "answered 500: oh no", 3),
        (lambda r: httpx.Response(403, text="who are you"), "answered 403: who are you", 1),
        (lambda r: httpx.Response(200, text="<html>"), "not one of a reward server", 1),
        (
            lambda r: httpx.Response(200, json={"grades": [{"id": "0", "score": "high"}]}),
            "not one of a reward server",
            1,
        ),
        (lambda r: httpx.Response(200, json={"grades": [{"id": "7", "score": 1}]}), "no grade for this answer", 1),
        (lambda r: httpx.Response(200, json={"grades": [{"id": "0"}]}), "neither a score nor an error", 1),
        (lambda r: httpx.Response(200, json={"grades": [{"id": "0", "error": "model down"}]}), "model down", 1),
        (lambda r: httpx.Response(200, text="x" * 2000), "longer than 1000 bytes", 1),
        (
            lambda r: httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b"zip")),
            "compressed",
            1,
        ),
        (lambda r: httpx.Response(302, headers={"location": "/else"}), "answered 302", 1),
        (lambda r: httpx.Response(307, headers={"location": "https://other.example/"}), "redirects to another host", 1),
        (lambda r: httpx.Response(307, headers={"location": "http://reward.example/x"}), "scheme must be https", 1),
        (
            lambda r: httpx.Response(307, headers={"location": "https://reward.example:8443/"}),
            "redirects to another host",
            1,
        ),
        (lambda r: httpx.Response(308, headers={"location": "/again"}), "redirects more than 3 times", 4),
    ],
)
def test_what_fails_is_an_error_of_each_grade(handler: Handler, said: str, attempts: int) -> None:
    seen = 0

    def counting(request: httpx.Request) -> httpx.Response:
        nonlocal seen
        seen += 1
        return handler(request)

    (grade,) = graded(reward(counting, retries=2, max_bytes=1000), "abc", deadline_s=30)
    assert grade.score is None
    assert said in str(grade.error)
    assert seen == attempts


def test_a_redirect_within_the_host_is_followed() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/score":
            return httpx.Response(307, headers={"location": "/v2/score"})
        assert request.url.path == "/v2/score"
        return by_length(request)

    assert graded(reward(handler), "abc")[0].score == 3.0


def test_a_slow_server_is_given_up() -> None:
    async def hangs(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError

    grader = HttpReward(
        URL, transport=httpx.MockTransport(hangs), resolve=resolver(PUBLIC), timeout_s=0.1, retries=1, first_wait_s=0.0
    )
    (grade,) = graded(grader, "abc", deadline_s=30)
    assert "no reply within 0.1 s" in str(grade.error)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.3.4",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "100.100.100.200",
        "192.0.0.8",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:db8::1",
        "not an address",
    ],
)
def test_addresses_inside_are_refused(address: str) -> None:
    assert not UrlGuard().allows(address)
    (grade,) = graded(reward(by_length, resolve=resolver(address)), "abc")
    assert "is not a public address" in str(grade.error)
    (grade,) = graded(reward(by_length, resolve=resolver(PUBLIC, address)), "abc")  # one of several is enough
    assert grade.score is None


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert UrlGuard().allows(address)


def test_inner_addresses_are_allowed_by_name_only() -> None:
    guard = UrlGuard(allow=("10.1.0.0/16", "::1"))
    assert guard.allows("10.1.2.3")
    assert guard.allows("::ffff:10.1.2.3")
    assert guard.allows("::1")
    assert not guard.allows("10.2.0.1")
    assert not guard.allows("169.254.169.254")
    with pytest.raises(ConfigError, match="give addresses or networks"):
        UrlGuard(allow=("localhost",))


@pytest.mark.parametrize(
    "url",
    [
        "http://reward.example/",
        "file:///etc/passwd",
        "ftp://reward.example",
        "https://",
        "https://user:pw@reward.example",
        "https://reward.example:0",
        "https://reward.example:99999",
        "gopher://x",
        "//reward.example",
        "https://[fe80::1%eth0]/",
    ],
)
def test_urls_of_another_form_are_refused(url: str) -> None:
    with pytest.raises(UrlRefused):
        UrlGuard().split(url)
    with pytest.raises(ConfigError):
        HttpReward(url)


def test_the_address_that_was_checked_is_the_one_connected_to() -> None:
    # A name that answers with a public address first and an inner one afterwards (DNS rebinding).
    answers = [PUBLIC, "169.254.169.254"]
    connected: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        return [answers.pop(0)]

    def handler(request: httpx.Request) -> httpx.Response:
        connected.append(request.url.host)
        return by_length(request)

    grader = reward(handler, resolve=resolve)
    assert graded(grader, "abc")[0].score == 3.0
    assert connected == [PUBLIC]
    assert "is not a public address" in str(graded(grader, "abc")[0].error)
    assert connected == [PUBLIC]


def test_a_name_that_does_not_resolve_is_an_error() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        raise OSError("no such name")

    assert "cannot be resolved" in str(graded(reward(by_length, resolve=resolve), "abc")[0].error)


@pytest.mark.parametrize("url", ["http://2130706433/", "http://0x7f.1/", "http://127.1/", "http://localhost/"])
def test_the_systems_resolver_is_not_fooled(url: str) -> None:
    (grade,) = graded(HttpReward(url, schemes=("http",), retries=0), "abc")
    assert grade.score is None
    assert "is not a public address" in str(grade.error) or "cannot be resolved" in str(grade.error)


@pytest.fixture
def server() -> Iterator[str]:
    """A real reward server on this machine."""

    class Score(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            grades = [{"id": item["id"], "score": float("2" in item["answer"])} for item in body["items"]]
            reply = json.dumps({"grades": grades}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Score)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://localhost:{running.server_port}/score"
    running.shutdown()
    running.server_close()


def test_a_real_server_is_reached_where_it_is_allowed(server: str) -> None:
    grader = HttpReward(server, schemes=("http",), allow=("127.0.0.1", "::1"), retries=0, resolve=resolver("127.0.0.1"))
    assert [grade.score for grade in graded(grader, "2", "3", "12", deadline_s=30)] == [1.0, 0.0, 1.0]
    refused = HttpReward(server, schemes=("http",), retries=0)
    assert "is not a public address" in str(graded(refused, "2")[0].error)


def test_settings_that_cannot_be() -> None:
    for wrong in ({"batch_size": 0}, {"timeout_s": 0}, {"max_bytes": 0}, {"retries": -1}, {"schemes": ("file",)}):
        with pytest.raises(ConfigError):
            HttpReward(URL, **wrong)  # type: ignore[arg-type]
