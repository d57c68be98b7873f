"""Starting, ending and draining."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from posttrain import serve
from posttrain.core import ServeError, StopReason
from posttrain.feedback import FeedbackStore

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True}

PROGRAM = """
import sys, importlib.util
spec = importlib.util.spec_from_file_location("serve_conftest", sys.argv[1])
house = importlib.util.module_from_spec(spec)
sys.modules["serve_conftest"] = house
spec.loader.exec_module(house)
from pathlib import Path
from posttrain import serve
from posttrain.feedback import FeedbackStore
engine = house.PacedEngine(answer=lambda prompt: "x" * 40, step_s=float(sys.argv[4]))
model = serve.ServedModel(name="tiny", engine=engine, renderer=house.PlainRenderer())
with FeedbackStore(Path(sys.argv[2])) as store:
    serve.run(serve.create_app({"tiny": model}, store=store), port=int(sys.argv[3]), drain_s=float(sys.argv[5]))
    print("clean end", flush=True)
"""


@contextmanager
def process(path: Path, port: int, step_s: float, drain_s: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    conftest = Path(__file__).with_name("conftest.py")
    arguments = [str(conftest), str(path), str(port), str(step_s), str(drain_s)]
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(url + "/ready").raise_for_status()
                break
            except httpx.TransportError:
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield child, url
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
def test_sigterm_is_not_ready_at_once_drains_and_ends_cleanly(tmp_path: Path, free_port: int) -> None:
    with process(tmp_path / "store.db", free_port, step_s=0.05, drain_s=30) as (child, url):
        with httpx.stream("POST", url + "/v1/chat/completions", json=CHAT) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(child.pid, signal.SIGTERM)
            deadline = time.monotonic() + 1
            while httpx.get(url + "/ready").status_code != 503:
                assert time.monotonic() < deadline
            assert httpx.get(url + "/health").status_code == 200
            late = httpx.post(url + "/v1/chat/completions", json=CHAT)
            assert (late.status_code, "retry-after" in late.headers) == (503, True)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert sum('"content":"x"' in line for line in rest) >= 38
        assert child.wait(timeout=10) == 0
        assert child.stdout is not None
        assert "clean end" in child.stdout.read()
    with FeedbackStore(tmp_path / "store.db") as store:
        (logged,) = store.interactions().items
    assert (logged.text, logged.stop_reason) == ("x" * 40, StopReason.EOS)


@pytest.mark.slow
def test_what_is_not_done_at_the_deadline_is_cancelled_and_logged(tmp_path: Path, free_port: int) -> None:
    with (
        process(tmp_path / "store.db", free_port, step_s=1.0, drain_s=0.5) as (child, url),
        httpx.stream("POST", url + "/v1/chat/completions", json=CHAT) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(timeout=15) == 0
    with FeedbackStore(tmp_path / "store.db") as store:
        (logged,) = store.interactions().items
    assert logged.stop_reason is StopReason.CANCELLED
    assert 0 < len(logged.tokens) < 40


def test_stop_lets_requests_finish(model: serve.ServedModel, engine, store: FeedbackStore) -> None:
    engine.step_s = 0.02
    server = serve.Server(serve.create_app({"tiny": model}, store=store)).start()
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=CHAT) as answer:
        lines = answer.iter_lines()
        next(lines)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        rest = [line for line in lines if line]
    stopping.join(10)
    assert not stopping.is_alive()
    assert rest[-1] == "data: [DONE]"
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url + "/health")


def test_a_taken_port_is_told(server: serve.Server, model: serve.ServedModel) -> None:
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(ServeError, match="Choose another port"):
        serve.Server(serve.create_app({"tiny": model}), port=port).start()


def test_the_missing_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['starlette'] = None\n"
        "from posttrain import serve\n"
        "serve.ModelTable([])\n"
        "from posttrain.core import MissingExtraError\n"
        "try: serve.create_app\n"
        "except MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'posttrain[serve]'" in done.stdout


def test_the_door_names_what_there_is() -> None:
    assert serve.__all__ == sorted(serve.__all__)
    assert all(getattr(serve, name) is not None for name in serve.__all__)
