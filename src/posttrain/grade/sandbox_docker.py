"""The sandbox in containers: for machines that have Docker (or Podman) and no namespaces for everybody.

Slower than `Sandbox` (a container takes some tenths of a second) and as strong as the container runtime; with
`runtime="runsc"` (gVisor) or `"kata"` the code does not even see the host's kernel.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from posttrain.core import GradeError
from posttrain.grade.combine import in_daemon_thread
from posttrain.grade.sandbox import JudgedTests, SandboxLimits, SandboxRun
from posttrain.grade.sandbox_process import SandboxUnavailable, crowding

_SOURCES = ("sandbox_guest", "sandbox_judge")
_NOT_RUN = 125  # exit status of `docker run` where the daemon or its options are at fault
# Reads its orders from standard input, says that it begins, and runs them as the guest of `Sandbox` would.
_BOOT = """
import json, os, sys, types
def take(n):
    data = b''
    while len(data) < n:
        data += os.read(0, min(n - len(data), 1 << 20)) or sys.exit(3)
    return data
job = json.loads(take(int.from_bytes(take(4), 'big')))
for name, source in job['sources'].items():
    sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, 'exec'), sys.modules[name].__dict__)
os.makedirs('/tmp/work', exist_ok=True)
os.chdir('/tmp/work')
os.write(1, b'\\x06')
if job['role'] == 'program':
    fd = os.open('/tmp/.payload', os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.unlink('/tmp/.payload')
    os.write(fd, json.dumps(job['payload']).encode()); os.lseek(fd, 0, 0)
    sys.modules['sandbox_guest'].run('program', [fd])
ends = [os.dup(fd) for fd in (0, 1, 2)]
nothing = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2): os.dup2(nothing, fd)
halves = sys.modules['sandbox_judge']
if job['role'] == 'candidate':
    os.close(ends.pop())
    halves.Candidate(*ends).serve(job['payload']['program'])
else:
    os.write(ends[2], (job['payload']['mark'] + '\\n').encode())
    halves.Judge(ends[0], ends[2], ends[1]).judge(job['payload'])
os._exit(0)
"""


class DockerSandbox:
    """Runs each program in a container of its own: no network, read-only root, nobody's rights, limits; then removed.

    Args:
        image: with `python3` in it; it is not pulled.
        limits: what each run may use. `disk_bytes` is of /tmp; `tasks` holds whether `spawn` is set or not.
        docker: the program to call; `podman` understands the same words.
        runtime: another container runtime, such as `runsc`.
        start_s: seconds that a container may take before its code begins.
    """

    def __init__(
        self,
        image: str = "python:3.11-slim",
        limits: SandboxLimits | None = None,
        *,
        docker: str = "docker",
        runtime: str | None = None,
        start_s: float = 60.0,
    ) -> None:
        self.image = image
        self.limits = limits or SandboxLimits()
        self._docker = docker
        self._runtime = runtime
        self._start_s = start_s

    def start(self) -> None:
        """Run a program of one line.

        Raises:
            SandboxUnavailable: there is no Docker here, or it does not run the image.
        """
        run = self.run_now("print('in')")
        if run.stdout != "in\n":
            raise SandboxUnavailable(f"docker: a program of one line did not run in {self.image}: {run.stderr[-300:]}")

    async def run(self, program: str, stdin: str = "", files: Mapping[str, str] | None = None) -> SandboxRun:
        """Run a Python program; see `Sandbox.run_now`."""
        run: SandboxRun = await in_daemon_thread(self.run_now, program, stdin, files)
        return run

    def run_now(self, program: str, stdin: str = "", files: Mapping[str, str] | None = None) -> SandboxRun:
        """Run a Python program to its end or its limits."""
        started_s = time.monotonic()
        payload = {"program": program, "stdin": stdin, "files": dict(files or {})}
        with self._container("program", payload) as container:
            out = _Pipe(container.process.stdout, self.limits.output_bytes)
            err = _Pipe(container.process.stderr, self.limits.output_bytes)
            too_much, timed_out = container.wait([out, err], self.limits.wall_s)
        status = container.process.returncode
        if status == _NOT_RUN and not container.begun:
            raise SandboxUnavailable(f"docker: {err.text()[-300:].strip() or 'it did not run'}")
        stopped = too_much or timed_out
        return SandboxRun(
            stdout=out.text(),
            stderr=err.text(),
            exit_status=None if stopped else status if status < 128 else 128 - status,
            timed_out=timed_out or status == 128 + 24 or (status == 137 and self._spent(started_s)),
            too_much_output=too_much,
            seconds=time.monotonic() - started_s,
        )

    async def judge(
        self, program: str, tests: Sequence[str], *, setup: str = "", names: Sequence[str] = ()
    ) -> JudgedTests:
        """Test a program; see `Sandbox.judge_now`."""
        judged: JudgedTests = await in_daemon_thread(lambda: self.judge_now(program, tests, setup=setup, names=names))
        return judged

    def judge_now(
        self, program: str, tests: Sequence[str], *, setup: str = "", names: Sequence[str] = ()
    ) -> JudgedTests:
        """Tests in one container, the program in another; this process carries messages between the two."""
        started_s = time.monotonic()
        mark = secrets.token_hex(16)
        payload = {"setup": setup, "tests": list(tests), "names": list(names), "mark": mark}
        with (
            self._container("candidate", {"program": program}) as candidate,
            self._container("judge", payload) as judge,
        ):
            verdict = _Pipe(judge.process.stderr, 1_000_000)
            _Pipe(candidate.process.stderr, 100_000)
            candidate.carry_to(judge)
            judge.carry_to(candidate)
            _, late = judge.wait([verdict], self.limits.wall_s)
        if not judge.begun:
            raise SandboxUnavailable(f"docker: {verdict.text()[-300:].strip() or 'it did not run'}")
        _, _, said = verdict.text().partition(mark + "\n")
        found = [json.loads(line) for line in said.splitlines()]
        if found and isinstance(found[0], dict):
            raise GradeError(f"sandbox: {found[0]['broken']}")
        missing = "not within the time" if late else "the tests were broken off"
        results = [*found, *[missing] * (len(tests) - len(found))]
        return JudgedTests(results=tuple(results), timed_out=late, seconds=time.monotonic() - started_s)

    def close(self) -> None:
        """Nothing is held between runs."""

    def command(self, name: str) -> list[str]:
        """The words that run the container `name`."""
        limits = self.limits
        return [
            self._docker, "run", "--rm", "--interactive", "--name", name, "--pull", "never", "--network", "none",
            "--read-only", "--tmpfs", f"/tmp:rw,nosuid,nodev,noexec,size={limits.disk_bytes},mode=1777",
            "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", "65534:65534",
            "--hostname", "sandbox", "--ipc", "none", "--log-driver", "none", "--workdir", "/tmp",
            "--env", "HOME=/tmp/work",
            "--pids-limit", str(limits.tasks + 2), "--memory", str(limits.memory_bytes),
            "--memory-swap", str(limits.memory_bytes), "--ulimit", f"cpu={limits.cpu_s}:{limits.cpu_s}",
            "--ulimit", f"fsize={limits.file_bytes}", "--ulimit", f"nofile={limits.open_files}", "--ulimit", "core=0",
            *(["--runtime", self._runtime] if self._runtime else []), self.image, "python3", "-I", "-S", "-c", _BOOT,
        ]  # fmt: skip

    def _spent(self, started_s: float) -> bool:
        return time.monotonic() - started_s >= 0.9 * self.limits.cpu_s

    def _container(self, role: str, payload: Mapping[str, Any]) -> _Container:
        if shutil.which(self._docker) is None:
            raise SandboxUnavailable(f"docker: there is no program {self._docker!r} here, so nothing was run")
        folder = Path(__file__).parent
        sources = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in _SOURCES}
        job = json.dumps({"role": role, "payload": payload, "sources": sources}).encode()
        name = f"posttrain-{secrets.token_hex(8)}"
        return _Container(self.command(name), [self._docker, "kill", name], job, self._start_s)


class _Container:
    """One container: its client's process, and the word that ends it."""

    def __init__(self, command: Sequence[str], kill: Sequence[str], job: bytes, start_s: float) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        self._kill = list(kill)
        self.begun = False
        slow = threading.Timer(start_s, self.process.kill)
        slow.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                assert self.process.stdin is not None
                self.process.stdin.write(len(job).to_bytes(4, "big") + job)
                self.process.stdin.flush()
            assert self.process.stdout is not None
            self.begun = self.process.stdout.read(1) == b"\x06"
        finally:
            slow.cancel()

    def __enter__(self) -> _Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()

    def stop(self) -> None:
        """End it, and its client."""
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                subprocess.run(self._kill, capture_output=True, timeout=30.0)
            self.process.kill()

    def wait(self, pipes: Sequence[_Pipe], wall_s: float) -> tuple[bool, bool]:
        """Until it ends, says too much, or its time is over; returns (too much, too late)."""
        until_s = time.monotonic() + wall_s * crowding()
        while any(pipe.is_open for pipe in pipes):
            if any(pipe.too_much for pipe in pipes):
                break
            if time.monotonic() > until_s:
                return False, True
            time.sleep(0.01)  # nothing beside the start of a container
        too_much = any(pipe.too_much for pipe in pipes)
        if not too_much:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0.1, until_s - time.monotonic()))
        return too_much, False

    def carry_to(self, other: _Container) -> None:
        """Carry what it says to another's standard input, from now on."""

        def carry() -> None:
            assert self.process.stdout is not None
            assert other.process.stdin is not None
            with contextlib.suppress(OSError, ValueError):
                while data := self.process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
                    other.process.stdin.write(data)
                    other.process.stdin.flush()
            with contextlib.suppress(OSError, ValueError):
                other.process.stdin.close()

        threading.Thread(target=carry, name="container", daemon=True).start()


class _Pipe:
    """Reads a pipe in a thread, up to a cap."""

    def __init__(self, pipe: IO[bytes] | None, cap: int) -> None:
        self._data = bytearray()
        self.is_open, self.too_much = True, False
        threading.Thread(target=self._read, args=(pipe, cap), name="container", daemon=True).start()

    def text(self) -> str:
        """What came."""
        return self._data.decode("utf-8", "replace")

    def _read(self, pipe: Any, cap: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := pipe.read1(1 << 16):
                room = cap - len(self._data)
                self._data += data[:room]
                if len(data) > room:
                    self.too_much = True
                    break
        self.is_open = False
