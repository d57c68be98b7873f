"""Render chat templates in a child process that is killed when it overruns its time or memory."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.core import RenderError

WORKER = Path(__file__).with_name("template_worker.py")
ROWS_PER_FRAME = 256
BYTES_PER_FRAME = 4_000_000
DEATHS_PER_REQUEST = 3


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one rendering may use."""

    seconds: float = 5.0  # wall clock and processor time of one conversation
    memory_bytes: int = 512 * 2**20  # address space beyond the idle worker's
    max_characters: int = 16_000_000  # of the rendered text


@dataclass(frozen=True)
class RenderedText:
    """A conversation's text, and the spans (start, end) of its {% generation %} blocks, in characters."""

    text: str
    generation: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class TemplateFailure:
    """Why the template gave no text. `kind`: syntax, template, security, memory, time."""

    kind: str
    message: str

    def error(self) -> RenderError:
        """The failure as an exception that says what to do."""
        advice = {
            "syntax": "the chat template is not valid Jinja",
            "template": "the chat template refuses these messages",
            "security": "the chat template reaches for what the sandbox forbids",
            "memory": "the chat template uses more memory than it may; shorten the messages or mistrust the template",
            "time": "the chat template runs longer than it may; mistrust it",
        }
        return RenderError(f"{advice[self.kind]}: {self.message}")


@dataclass
class TemplateProcess:
    """One worker, started when first needed, restarted after it was killed. Safe to use from several threads."""

    limits: Limits = field(default_factory=Limits)
    _child: subprocess.Popen[bytes] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def render(self, template: str, rows: Sequence[dict[str, Any]]) -> list[RenderedText | TemplateFailure]:
        """Render many sets of variables with one template; a row that fails does not harm the others."""
        results: list[RenderedText | TemplateFailure] = []
        deaths = 0
        with self._lock:
            while len(results) < len(rows):
                results.extend(self._render_frame(template, rows[len(results) :]))
                deaths += self._child is None
                if deaths == DEATHS_PER_REQUEST and isinstance(results[-1], TemplateFailure):
                    # A template that overruns row after row would take its full time for each of thousands.
                    results.extend([results[-1]] * (len(rows) - len(results)))
        return results

    def close(self) -> None:
        """End the worker; the next request starts another."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _render_frame(self, template: str, rows: Sequence[dict[str, Any]]) -> list[RenderedText | TemplateFailure]:
        """As many rows as one frame holds, at most up to the first that kills the worker; at least one."""
        head = json.dumps(
            {"template": template, "cpu_s": self.limits.seconds, "max_characters": self.limits.max_characters}
        )
        bodies = list(_fitting(rows))
        body = f'{head[:-1]}, "rows": [{", ".join(bodies)}]}}'.encode("ascii")
        child = self._started()
        assert child.stdin is not None
        results: list[RenderedText | TemplateFailure] = []
        try:
            child.stdin.write(struct.pack(">I", len(body)) + body)
            child.stdin.flush()
            for _ in bodies:
                results.append(_result(self._read_frame(child)))
        except TimeoutError:
            self.close()
            results.append(TemplateFailure("time", f"not done after {self.limits.seconds:g} s"))
        except (OSError, EOFError, ValueError):  # ValueError: what came back is no JSON
            self.close()
            results.append(_death(child.returncode, self.limits))
        else:
            if any(isinstance(result, TemplateFailure) and result.kind == "memory" for result in results):
                self.close()
        return results

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is not None:
            self.close()
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-I", str(WORKER), str(self.limits.memory_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={key: os.environ[key] for key in ("TZ", "LANG", "LC_ALL") if key in os.environ},
                cwd="/",
                close_fds=True,
            )
        return self._child

    def _read_frame(self, child: subprocess.Popen[bytes]) -> dict[str, Any]:
        # Twice the time a row may use: the kernel's limit on processor time speaks first, this one is for sleepers and
        # for a machine that is busy. The first row also waits for the interpreter to start.
        deadline = time.monotonic() + 2 * self.limits.seconds + 10.0
        length: int = struct.unpack(">I", _read_exactly(child, 4, deadline))[0]
        if length > 12 * self.limits.max_characters + 65536:  # JSON writes a character in at most twelve bytes
            raise EOFError
        answer: dict[str, Any] = json.loads(_read_exactly(child, length, deadline))
        return answer


def _fitting(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    size = 0
    for number, row in enumerate(rows):
        text = json.dumps(row)
        size += len(text)
        if number and (number >= ROWS_PER_FRAME or size > BYTES_PER_FRAME):
            return
        yield text


def _read_exactly(child: subprocess.Popen[bytes], count: int, deadline: float) -> bytes:
    assert child.stdout is not None
    descriptor = child.stdout.fileno()
    data = bytearray()
    while len(data) < count:
        wait_s = deadline - time.monotonic()
        if wait_s <= 0 or not select.select([descriptor], [], [], wait_s)[0]:
            raise TimeoutError
        piece = os.read(descriptor, min(count - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _result(answer: dict[str, Any]) -> RenderedText | TemplateFailure:
    if "error" in answer:
        return TemplateFailure(answer["error"], answer["message"])
    return RenderedText(answer["text"], tuple((start, end) for start, end in answer["generation"]))


def _death(code: int | None, limits: Limits) -> TemplateFailure:
    if code == -signal.SIGXCPU:
        return TemplateFailure("time", f"killed after {limits.seconds:g} s of processor time")
    return TemplateFailure("memory", f"the template process died (exit status {code})")


_shared = [TemplateProcess()]
atexit.register(lambda: _shared[-1].close())
# A forked child must neither speak on its parent's pipes nor wait for a lock that no thread of its own will release.
os.register_at_fork(after_in_child=lambda: _shared.append(TemplateProcess()))


def render_template(template: str, rows: Sequence[dict[str, Any]]) -> list[RenderedText | TemplateFailure]:
    """Render with this process's shared worker."""
    return _shared[-1].render(template, rows)
