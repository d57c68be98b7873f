"""Processes that answer one JSON line with another, and are killed and replaced when they hang or die."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from posttrain.core import ConfigError


class WorkerFailure(Exception):
    """A worker hung, died or could not start; the message says which."""


class WorkerPool:
    """A fixed number of persistent worker processes, each with one job at a time. Usable from any thread.

    Args:
        module: run as `python -m module`; it prints a line once it is ready, then one JSON line for each it reads.
        num_workers: processes.
        start_timeout_s: seconds that a process may take to be ready.
    """

    def __init__(self, module: str, num_workers: int = 1, start_timeout_s: float = 60.0) -> None:
        if num_workers < 1:
            raise ConfigError(f"a pool needs at least one worker, not {num_workers}")
        self._workers = [_Worker(module, start_timeout_s) for _ in range(num_workers)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in reversed(self._workers):
            self._idle.put(worker)
        self._starting = threading.Lock()
        self._finalizer = weakref.finalize(self, _kill_all, self._workers)

    def start(self) -> None:
        """Start every process that is not running and wait until each is ready.

        Raises:
            WorkerFailure: one cannot start.
        """
        self._check_open()
        with self._starting:  # two threads that each hold half of the workers would wait for ever
            taken = [self._idle.get() for _ in self._workers]
            try:
                for worker in taken:
                    worker.launch()
                for worker in taken:
                    worker.wait_until_ready()
            finally:
                for worker in taken:
                    self._idle.put(worker)

    def call(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Give a job to an idle worker; waits for one first. The clock starts when the worker has the job.

        Raises:
            WorkerFailure: no answer in time (the process is killed), or the process died. The next job gets a new one.
        """
        self._check_open()
        worker = self._idle.get()
        try:
            return worker.call(job, timeout_s)
        finally:
            self._idle.put(worker)

    def pids(self) -> list[int]:
        """Process ids of the workers that are running."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    def close(self) -> None:
        """Kill the processes; the pool takes no more jobs."""
        self._finalizer()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise WorkerFailure("the pool of workers is closed")


class _Worker:
    """One process and its pipes."""

    def __init__(self, module: str, start_timeout_s: float) -> None:
        self._module = module
        self._start_timeout_s = start_timeout_s
        self._ready = False
        self._job_id = 0
        self._buffer = b""
        self._launching = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start the process if it is not running; does not wait for it."""
        with self._launching:
            if self.process is not None and self.process.poll() is None:
                return
            self._reap()
            # The child finds this package wherever the parent found it.
            paths = os.pathsep.join(path for path in sys.path if path)
            self.process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # a Ctrl-C in the terminal is the parent's to handle
            )

    def wait_until_ready(self) -> None:
        if not self._ready:
            self._read_line(self._start_timeout_s, "did not start")
            self._ready = True

    def call(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self.launch()
        self.wait_until_ready()
        assert self.process is not None
        assert self.process.stdin is not None
        self._job_id += 1
        try:
            self.process.stdin.write(json.dumps({**job, "id": self._job_id}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            self._restart()
            raise WorkerFailure(f"the worker process was gone: {error}") from error
        answer: dict[str, Any] = json.loads(self._read_line(timeout_s, "gave no answer"))
        if answer.pop("id", None) != self._job_id:
            self._restart()
            raise WorkerFailure("the worker process answered another job")
        return answer

    def kill(self) -> None:
        with self._launching:
            self._reap()

    def _read_line(self, timeout_s: float, what: str) -> bytes:
        """The next line from the process; kills and replaces it when none comes."""
        assert self.process is not None
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0 or not selector.select(remaining_s):
                    self._restart()
                    raise WorkerFailure(f"the worker process {what} within {timeout_s:g} s and was killed")
                chunk = os.read(self.process.stdout.fileno(), 65536)
                if not chunk:
                    code = self.process.wait()
                    self._restart()
                    raise WorkerFailure(f"the worker process died (exit status {code})")
                self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _restart(self) -> None:
        """Kill the process and launch its successor at once, so that it is ready by the time of the next job."""
        self.kill()
        self.launch()

    def _reap(self) -> None:
        process, self.process = self.process, None
        self._ready, self._buffer = False, b""
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):  # what was still to be written to a dead process
                        pipe.close()


def _kill_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.kill()
