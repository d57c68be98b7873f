"""How the parent speaks with a worker: one line of JSON each way over stdin and stdout.

    {"do": "prepare", "workload": {...}, "inputs": "FILE"}  →  {"setting": {...}, "tried": [...], "seconds": 12.3}
    {"do": "run"}                                           →  {"seconds": 1.2, "cpu_s": 2.3, "work": 4096, ...}
    {"do": "peak"}                                          →  {"fp32": 1e11, "bf16": 4e11}

A worker that is not asked blocks on its stdin and takes no processor time. Needs the standard library alone, because
the peers' environment has nothing of ours.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

Answer = dict[str, Any]


class Runner(Protocol):
    """A workload that is loaded and warm."""

    @property
    def setting(self) -> Mapping[str, Any]:
        """How it is run: precision, batch sizes …"""
        ...

    @property
    def tried(self) -> list[dict[str, Any]]:
        """Settings that were tried, with their seconds or why they failed."""
        ...

    def run(self) -> dict[str, float]:
        """Do the work once: at least `seconds` and `work` (tokens, pairs, steps …)."""
        ...


class WorkerFailed(Exception):
    """A worker answered with an error, or ended."""


def serve(prepare: Callable[[Mapping[str, Any], Mapping[str, Any]], Runner], peak: Callable[[], Answer]) -> None:
    """Answer commands until stdin closes. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    runner: Runner | None = None
    for line in sys.stdin:
        command = json.loads(line)
        started_s = time.perf_counter()
        try:
            if command["do"] == "prepare":
                inputs = json.loads(Path(command["inputs"]).read_text(encoding="utf-8"))
                base = peak_rss()
                runner = prepare(command["workload"], inputs)
                answer: Answer = {"setting": dict(runner.setting), "tried": runner.tried, "rss_before": base}
                answer["seconds"] = time.perf_counter() - started_s
            elif command["do"] == "peak":
                answer = peak()
            elif runner is None:
                raise RuntimeError("run before prepare")
            else:
                cpu_s = time.process_time()
                answer = runner.run()
                answer["cpu_s"] = time.process_time() - cpu_s
                answer["peak_rss"] = peak_rss()
        except Exception as error:  # noqa: BLE001  the parent reports what a side cannot do, and goes on
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def peak_rss() -> int:
    """Bytes of memory that this process held at most."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


class Worker:
    """One side's process."""

    def __init__(
        self, python: Path, script: Path, *, threads: int, log: Path, search: bool = True, clock: str = "wall"
    ) -> None:
        """Start it.

        Args:
            python: interpreter of the side's environment.
            script: the side's program; calls `serve`.
            threads: for matrix products.
            log: what it prints.
            search: whether the side may try several settings; otherwise it takes its first.
            clock: by which the search judges: "wall", or "cpu" on a machine that others use too.
        """
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "VERSUS_SEARCH": "1" if search else "0",
            "VERSUS_CLOCK": clock,
        }
        self.name = script.stem
        self._log = log.open("a", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, command: Mapping[str, Any], *, timeout_s: float) -> Answer:
        """Send a command and wait.

        Raises:
            WorkerFailed: it answered with an error, ended, or did not answer in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise WorkerFailed(f"{self.name}: no answer to {command['do']!r} after {timeout_s:.0f} s") from None
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerFailed(f"{self.name}: ended with status {self._process.wait()}; see {self._log.name}")
        answer: Answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
