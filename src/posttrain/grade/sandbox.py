"""Runs code that a model wrote where it can do no harm, and judges it where it cannot reach the verdict.

Linux only. What is asked for is there or nothing runs: a layer that the kernel refuses raises `SandboxUnavailable` with
the layer's name, unless the caller gave that layer up by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import sysconfig
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from posttrain.core import ConfigError, GradeError, Record
from posttrain.grade.combine import in_daemon_thread
from posttrain.grade.sandbox_kernel import LAYERS
from posttrain.grade.sandbox_process import Job, Maker, Reader, SandboxUnavailable, ended

Layer = Literal["user", "pid", "mount", "network", "ipc", "uid", "capabilities", "seccomp", "limits"]


class SandboxLimits(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What code in the sandbox may use."""

    cpu_s: int = 5  # seconds of processor time
    wall_s: float = 15.0  # seconds by the clock; up to four times as many where processes wait for the cores
    memory_bytes: int = 1_000_000_000  # address space of each process; with `spawn` also what all hold together
    disk_bytes: int = 64_000_000  # of /tmp, the only place that can be written; it lies in memory
    file_bytes: int = 32_000_000  # of any one file
    open_files: int = 128
    tasks: int = 32  # threads, and processes where `spawn` allows them
    output_bytes: int = 1_000_000  # of standard output and of standard error; more ends the run
    spawn: bool = False  # whether processes and programs may be started, besides threads


class SandboxRun(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a run ended. Nothing in it is to be trusted as a verdict: the code chose its output and its exit status."""

    stdout: str
    stderr: str
    exit_status: int | None  # negative: the signal that ended it; None where it was stopped from outside
    timed_out: bool = False  # by the clock, or by processor time
    too_much_output: bool = False
    seconds: float = 0.0
    cpu_s: float = 0.0
    memory_bytes: int = 0  # largest resident size


class JudgedTests(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What came of each test: None where it holds, else why not."""

    results: tuple[str | None, ...]
    timed_out: bool = False
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """True where there are tests and all hold."""
        return bool(self.results) and all(result is None for result in self.results)


class Sandbox:
    """A place to run Python programs in. Usable from any thread; runs are independent of each other.

    A run sees the interpreter's library and a small writable /tmp; no network, no host processes, files, users or
    environment; it may make the system calls of a list. All of its processes end with it.

    Args:
        limits: what each run may use.
        without: layers given up by name, where the kernel has them not. Each makes the sandbox weaker.
        readable: host folders that code may read besides the interpreter's library, where everybody may read them; they
            are on its search path.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        *,
        without: Sequence[Layer] = (),
        readable: Sequence[Path] = (),
    ) -> None:
        unknown = sorted(set(without) - set(LAYERS))
        if unknown:
            raise ConfigError(f"sandbox: no layers named {', '.join(unknown)}; there are {', '.join(LAYERS)}")
        self.limits = limits or SandboxLimits()
        self.layers = tuple(layer for layer in LAYERS if layer not in without)
        self._search = [str(path.resolve()) for path in readable]
        self._readable = [*_library_paths(), *self._search]
        self._maker = Maker()
        self._finalizer = weakref.finalize(self, self._maker.close)

    def start(self) -> None:
        """Start the process that makes sandboxes, and run nothing in one to see that every layer is there.

        Raises:
            SandboxUnavailable: a layer is not there; names it.
        """
        run = self.run_now("print('in')")
        if run.stdout != "in\n":
            raise SandboxUnavailable(f"sandbox: a program of one line did not run: {run.stderr.strip()[-300:]}")

    async def run(self, program: str, stdin: str = "", files: Mapping[str, str] | None = None) -> SandboxRun:
        """Run a Python program; see `run_now`."""
        run: SandboxRun = await in_daemon_thread(self.run_now, program, stdin, files)
        return run

    def run_now(self, program: str, stdin: str = "", files: Mapping[str, str] | None = None) -> SandboxRun:
        """Run a Python program to its end or its limits.

        Args:
            program: source text.
            stdin: what it reads from standard input.
            files: text by path, relative to the folder it starts in.

        Raises:
            SandboxUnavailable: a layer is not there.
            GradeError: the sandbox itself was lost.
        """
        return self._run("program", {"program": program, "stdin": stdin, "files": dict(files or {})})

    def command_now(self, argv: Sequence[str], stdin: str = "", files: Mapping[str, str] | None = None) -> SandboxRun:
        """Run a program file, which `readable` must show; needs `limits.spawn`."""
        if not self.limits.spawn:
            raise ConfigError("sandbox: to run commands, set spawn=True in its limits")
        return self._run("command", {"argv": list(argv), "stdin": stdin, "files": dict(files or {})})

    async def judge(
        self, program: str, tests: Sequence[str], *, setup: str = "", names: Sequence[str] = ()
    ) -> JudgedTests:
        """Test a program; see `judge_now`."""
        judged: JudgedTests = await in_daemon_thread(lambda: self.judge_now(program, tests, setup=setup, names=names))
        return judged

    def judge_now(
        self, program: str, tests: Sequence[str], *, setup: str = "", names: Sequence[str] = ()
    ) -> JudgedTests:
        """Run tests on a program's functions, in a second sandbox which the program cannot reach.

        Arguments and results pass between the two as plain data (numbers, texts, lists, sets, dates …); other objects
        stay with the program, and tests hold a handle that calls through.

        Args:
            program: the code under test.
            tests: Python source of each test; it holds where it raises nothing.
            setup: source that the tests need, run once; trusted, like the tests.
            names: names that are taken from the program, also where the setup has them; none: every name that setup
                and tests use and do not define.

        Raises:
            SandboxUnavailable: a layer is not there.
            GradeError: the tests cannot be read, or the sandbox itself was lost.
        """
        started_s = time.monotonic()
        with contextlib.ExitStack() as stack:
            nowhere = stack.enter_context(Path(os.devnull).open("wb"))
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            verdict, verdict_write = _pipe(stack)
            out = nowhere.fileno()
            candidate = self._begin("candidate", {"program": program}, out, out, [theirs.fileno()])
            stack.enter_context(candidate)
            payload = {"setup": setup, "tests": list(tests), "names": list(names)}
            judge = self._begin("judge", payload, out, out, [ours.fileno(), verdict_write.fileno()])
            stack.enter_context(judge)
            for end in (ours, theirs, verdict_write):
                end.close()
            reader = Reader({verdict.fileno(): 1_000_000}, judge, self.limits.wall_s)
            lines = reader.read()[verdict.fileno()].splitlines()
            facts = ended(judge, reader)
            other = ended(candidate, reader, may_be_lost=True)
        found = [json.loads(line) for line in lines]
        if found and isinstance(found[0], dict):
            raise GradeError(f"sandbox: {found[0]['broken']}")
        late = reader.timed_out or self._spent(facts) or self._spent(other)
        missing = "not within the time" if late else "the tests were broken off"
        results = [*found, *[missing] * (len(tests) - len(found))]
        return JudgedTests(results=tuple(results), timed_out=late, seconds=time.monotonic() - started_s)

    @property
    def maker_pid(self) -> int | None:
        """Process id of what makes sandboxes; None before the first run."""
        return self._maker.pid

    def close(self) -> None:
        """End the process that makes sandboxes; the next run starts it again."""
        self._maker.close()

    def _run(self, role: str, payload: dict[str, Any]) -> SandboxRun:
        started_s = time.monotonic()
        with contextlib.ExitStack() as stack:
            out, out_write = _pipe(stack)
            err, err_write = _pipe(stack)
            job = stack.enter_context(self._begin(role, payload, out_write.fileno(), err_write.fileno(), []))
            out_write.close()
            err_write.close()
            caps = dict.fromkeys((out.fileno(), err.fileno()), self.limits.output_bytes)
            reader = Reader(caps, job, self.limits.wall_s)
            stdout, stderr = reader.read().values()
            facts = ended(job, reader)
        return SandboxRun(
            stdout=stdout.decode("utf-8", "replace"),
            stderr=stderr.decode("utf-8", "replace"),
            exit_status=facts.get("exit"),
            timed_out=reader.timed_out or self._spent(facts),
            too_much_output=reader.too_much,
            seconds=time.monotonic() - started_s,
            cpu_s=facts.get("cpu_s", 0.0),
            memory_bytes=facts.get("memory_bytes", 0),
        )

    def _spent(self, facts: Mapping[str, Any]) -> bool:
        """Whether it was the limit on processor time that ended a job."""
        return facts.get("exit") in (-9, -24) and facts["cpu_s"] >= 0.9 * self.limits.cpu_s

    def _begin(self, role: str, payload: dict[str, Any], out: int, err: int, others: list[int]) -> Job:
        limits = self.limits
        job = {
            "role": role,
            "layers": self.layers,
            "readable": self._readable,
            "disk_bytes": limits.disk_bytes,
            "wall_s": 4 * limits.wall_s + 70.0,  # this process keeps the time; that one is there if this one dies
            "spawn": limits.spawn,
            "memory_bytes": limits.memory_bytes,
            "limits": {
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_CPU": limits.cpu_s,
                "RLIMIT_FSIZE": limits.file_bytes,
                "RLIMIT_NOFILE": limits.open_files,
                "RLIMIT_NPROC": limits.tasks + 2,
                "RLIMIT_CORE": 0,
                "RLIMIT_MEMLOCK": 0,
                "RLIMIT_MSGQUEUE": 0,
            },
        }
        text = json.dumps({**payload, "search": self._search}).encode()
        return self._maker.begin(json.dumps(job).encode(), text, out, err, others)


def _library_paths() -> list[str]:
    """Folders without which the interpreter does not run, each once and no folder within another."""
    own = [str(Path(sys.base_prefix) / "lib"), sysconfig.get_path("stdlib")]
    wanted = [Path(path) for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", *own)]
    there = sorted({path for path in wanted if path.exists()}, key=lambda path: len(path.parts))
    kept: list[Path] = []
    for path in there:
        if not any(other in path.parents for other in kept if not other.is_symlink()):
            kept.append(path)
    return [str(path) for path in kept]


def _pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """The ends to read from and to write to; both are closed with the stack."""
    read, write = os.pipe()
    return stack.enter_context(os.fdopen(read, "rb", 0)), stack.enter_context(os.fdopen(write, "wb", 0))
