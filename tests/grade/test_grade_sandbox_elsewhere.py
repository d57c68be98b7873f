"""The sandbox behind one Protocol: in containers (with a stand-in for `docker`), and on a server."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.core import ConfigError, GradeError, Task
from posttrain.grade import (
    DockerSandbox,
    InputOutput,
    RemoteSandbox,
    RunsPrograms,
    Sandbox,
    SandboxLimits,
    SandboxServer,
    SandboxUnavailable,
    UnitTests,
    grade_all,
    prove,
    trajectory_from_text,
)

LIMITS = SandboxLimits(cpu_s=2, wall_s=10.0, output_bytes=100_000)

# Understands `run` and `kill`, notes the words, and runs the container's program on this machine.
_DOCKER = """#!{python}
import json, os, signal, sys
folder = {folder!r}
words = sys.argv[1:]
with open(os.path.join(folder, 'calls'), 'a') as calls:
    calls.write(json.dumps(words) + chr(10))
if words[0] == 'kill':
    os.kill(int(open(os.path.join(folder, words[1])).read()), signal.SIGKILL)
    sys.exit(0)
image = words.index('python3') - 1
if words[image] == 'absent':
    sys.stderr.write('docker: no such image' + chr(10))
    sys.exit(125)
name = words[words.index('--name') + 1]
open(os.path.join(folder, name), 'w').write(str(os.getpid()))
os.execv(sys.executable, [sys.executable, *words[image + 2:]])
"""


@pytest.fixture
def docker(tmp_path: Path) -> str:
    program = tmp_path / "docker"
    program.write_text(_DOCKER.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


@pytest.fixture(scope="module")
def served() -> Iterator[SandboxServer]:
    sandbox = Sandbox(LIMITS)
    try:
        sandbox.start()
    except SandboxUnavailable as error:
        pytest.skip(f"this kernel or container refuses a layer: {error}")
    server = SandboxServer(sandbox, token="open sesame", concurrency=2)
    threading.Thread(target=server.serve, daemon=True).start()
    yield server
    server.close()
    sandbox.close()


def test_containers_run_programs(docker: str) -> None:
    sandbox = DockerSandbox(limits=LIMITS, docker=docker)
    sandbox.start()
    run = sandbox.run_now("import sys\nprint('hello', input())\nprint('oh', file=sys.stderr)\nexit(3)", stdin="you\n")
    assert (run.stdout, run.stderr, run.exit_status) == ("hello you\n", "oh\n", 3)
    assert "ZeroDivisionError" in sandbox.run_now("1 / 0").stderr
    flood = sandbox.run_now("while True: print('x' * 1000)")
    assert flood.too_much_output
    assert len(flood.stdout) == LIMITS.output_bytes
    started_s = time.monotonic()
    late = DockerSandbox(limits=LIMITS.replace(wall_s=0.5), docker=docker).run_now("import time; time.sleep(60)")
    assert late.timed_out
    assert late.exit_status is None
    assert time.monotonic() - started_s < 15


def test_a_container_has_nothing_it_does_not_need(docker: str) -> None:
    limits = LIMITS.replace(memory_bytes=123_000_000, tasks=5)
    DockerSandbox("python:3.12-slim", limits, docker=docker, runtime="runsc").run_now("print(1)")
    words = json.loads((Path(docker).parent / "calls").read_text().splitlines()[0])
    for option, value in {
        "--network": "none", "--cap-drop": "ALL", "--security-opt": "no-new-privileges", "--user": "65534:65534",
        "--memory": "123000000", "--memory-swap": "123000000", "--pids-limit": "7", "--ipc": "none", "--pull": "never",
        "--runtime": "runsc",
    }.items():  # fmt: skip
        assert words[words.index(option) + 1] == value
    assert "--read-only" in words
    assert "--rm" in words
    assert not {"--privileged", "--volume", "-v", "--mount", "--env-file"} & set(words)
    assert words.index("python:3.12-slim") > words.index("--runtime")


def test_without_docker_nothing_runs(docker: str) -> None:
    with pytest.raises(SandboxUnavailable, match="no program 'no-such-docker'"):
        DockerSandbox(docker="no-such-docker").start()
    with pytest.raises(SandboxUnavailable, match="no such image"):
        DockerSandbox("absent", docker=docker).run_now("print(1)")
    with pytest.raises(SandboxUnavailable, match="no such image"):
        DockerSandbox("absent", docker=docker).judge_now("f = 1", ["assert f == 1"])


def test_containers_judge(docker: str) -> None:
    sandbox = DockerSandbox(limits=LIMITS, docker=docker)
    judged = sandbox.judge_now(
        "def f(x): return x * 2", ["assert f(3) == 6", "assert f(3) == 7", "assert f([1]) == [1, 1]"]
    )
    assert judged.results == (None, "AssertionError: ", None)
    for forged in (
        "import os\nos._exit(0)",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'null\\n' * 9)\n    except OSError: pass\n"
        "def f(x): return 0",
        "class A(int):\n    __eq__ = lambda *_: True\ndef f(x): return A()",
    ):
        assert not sandbox.judge_now(forged, ["assert f(3) == 6"]).passed
    with pytest.raises(GradeError, match="cannot be read"):
        sandbox.judge_now("f = 1", ["assert ("])
    asleep = DockerSandbox(limits=LIMITS.replace(wall_s=0.5), docker=docker)
    late = asleep.judge_now("import time\ndef f(x): time.sleep(60)", ["assert 1", "assert f(1)"])
    assert late.timed_out
    assert late.results == (None, "not within the time")


def test_a_server_runs_and_judges(served: SandboxServer) -> None:
    remote = RemoteSandbox(served.url, "open sesame")
    remote.start()
    run = remote.run_now("print(open('a.txt').read(), input())", stdin="in\n", files={"a.txt": "text"})
    assert (run.stdout, run.exit_status) == ("text in\n", 0)
    judged = remote.judge_now("def f(x): return x", ["assert f(1) == 1", "assert f(1) == 2"])
    assert judged.results == (None, "AssertionError: ")
    with pytest.raises(GradeError, match="cannot be read"):
        remote.judge_now("f = 1", ["assert ("])


def test_a_server_knows_its_callers(served: SandboxServer) -> None:
    for token in ("open barley", ""):
        with pytest.raises(GradeError, match="status 401"):
            RemoteSandbox(served.url, token).run_now("print(1)")
    with pytest.raises(SandboxUnavailable, match="status 401"):
        RemoteSandbox(served.url, "").start()


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SandboxUnavailable, match=r"no answer after 2 attempts .*nothing was run"):
        RemoteSandbox(f"http://127.0.0.1:{port}", "", attempts=2).run_now("print(1)")
    with pytest.raises(ConfigError, match="no http"):
        RemoteSandbox("file:///etc/passwd")


def test_a_server_without_a_sandbox_says_so() -> None:
    class None_(Sandbox):
        def run_now(self, *_: object, **__: object) -> object:  # type: ignore[override]
            raise SandboxUnavailable("sandbox: the layer 'user' is not to be had here")

    server = SandboxServer(None_())
    threading.Thread(target=server.serve, daemon=True).start()
    with pytest.raises(SandboxUnavailable, match="the layer 'user' is not to be had here"):
        RemoteSandbox(server.url).run_now("print(1)")
    server.close()


@pytest.mark.parametrize("place", ["docker", "remote"])
def test_graders_take_any_place(place: str, docker: str, served: SandboxServer) -> None:
    quick = LIMITS.replace(cpu_s=1, wall_s=4.0)
    runner: RunsPrograms = (
        DockerSandbox(limits=quick, docker=docker) if place == "docker" else RemoteSandbox(served.url, "open sesame")
    )
    assert prove(InputOutput(runner)).problems == ()
    task = Task(id="t", prompt="?", facts={"tests": ["assert f(2) == 4"]})
    answers = [trajectory_from_text(task, f"def f(x): return x * {n}") for n in (1, 2, 3)]
    grades = asyncio.run(grade_all(UnitTests(runner), answers, deadline_s=60))
    assert [grade.score for grade in grades] == [0.0, 1.0, 0.0]
