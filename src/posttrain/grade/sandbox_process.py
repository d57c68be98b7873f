"""Sandboxes seen from outside: the process that makes them, one job's control socket, and its pipes."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from posttrain.core import GradeError

_START_S = 60.0  # for a sandbox to be made, which on a busy machine takes long; no part of the code's own time
_GRACE_S = 5.0  # for the processes to be gone once they are told to
_CHUNK = 65536
_BUSIEST = 4.0  # times its wall-clock time that code gets at most where it must share the cores


def crowding() -> float:
    """How many processes want each core, from 1 to 4: by so much longer code may take by the clock."""
    try:
        load = os.getloadavg()[0]
    except OSError:
        return 1.0
    return min(_BUSIEST, max(1.0, load / max(1, os.cpu_count() or 1)))


class SandboxUnavailable(GradeError):
    """The kernel refuses a layer of the sandbox; nothing was run."""


class Maker:
    """The process of `sandbox_worker`, and the socket to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, where there is one."""
        return None if self._process is None else self._process.pid

    def begin(self, job: bytes, payload: bytes, out: int, err: int, others: list[int]) -> Job:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("payload")
        try:
            os.write(memory, payload)
            os.lseek(memory, 0, os.SEEK_SET)
            descriptors = [theirs.fileno(), memory, out, err, *others]
            with self._lock:
                try:
                    socket.send_fds(self._started(), [job], descriptors)
                except OSError:
                    self._end()
                    socket.send_fds(self._started(), [job], descriptors)
        except BaseException:
            control.close()
            raise
        finally:
            theirs.close()
            os.close(memory)
        return Job(control)

    def close(self) -> None:
        with self._lock:
            self._end()

    def _started(self) -> socket.socket:
        if self._socket is None:
            if sys.platform != "linux":
                raise SandboxUnavailable(f"sandbox: needs Linux, this is {sys.platform}")
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            script = Path(__file__).with_name("sandbox_worker.py")
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(script), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={"LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"},  # nothing of ours: code could read it in memory
                cwd="/",
                start_new_session=True,
            )
            theirs.close()
            self._socket = ours
        return self._socket

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._socket = self._process = None


class Job:
    """One sandbox, from outside: its control socket."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.control.close()

    def stop(self) -> None:
        """Have everything in it killed."""
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_WR)

    def receive(self) -> bool:
        """Take in what it says; False once all of its processes are gone."""
        try:
            line = self.control.recv(_CHUNK)
        except OSError:
            return False
        if line:
            self.facts.update(json.loads(line))
        return bool(line)


class Reader:
    """Reads a job's pipes up to their caps until the job is gone or its time is over.

    Its time begins with its code. On a crowded machine it is longer, so that others' work decides no verdict: what
    spins is ended by its limit on processor time, what sleeps by the clock.
    """

    def __init__(self, caps: dict[int, int], job: Job, wall_s: float) -> None:
        self._caps = caps
        self._job = job
        self._wall_s = wall_s
        self._deadline_s = time.monotonic() + _START_S
        self._begun_s: float | None = None
        self.timed_out = self.too_much = False

    def read(self) -> dict[int, bytes]:
        """What came through each pipe."""
        found = {descriptor: bytearray() for descriptor in self._caps}
        open_pipes = set(self._caps)
        with selectors.DefaultSelector() as selector:
            for descriptor in (*self._caps, self._job.control.fileno()):
                selector.register(descriptor, selectors.EVENT_READ)
            running = True
            while running or open_pipes:
                remaining_s = self._deadline_s - time.monotonic()
                ready = selector.select(max(0.0, remaining_s)) if remaining_s > 0 else []
                if not ready and self._deadline_s - time.monotonic() <= 0:
                    if self._begun_s is None:
                        raise GradeError(f"sandbox: its code did not begin within {_START_S:g} s; too much runs here")
                    longer_s = self._begun_s + self._wall_s * crowding()
                    if longer_s > time.monotonic():
                        self._deadline_s = longer_s
                        continue
                    self.timed_out = True
                    return {descriptor: bytes(data) for descriptor, data in found.items()}
                for key, _ in ready:
                    if key.fd == self._job.control.fileno():
                        running = self._job.receive()
                        if self._begun_s is None and self._job.facts.get("begun"):
                            self._begun_s = time.monotonic()
                            self._deadline_s = self._begun_s + self._wall_s
                        if not running:
                            selector.unregister(key.fd)
                        continue
                    data = os.read(key.fd, _CHUNK)
                    room = self._caps[key.fd] - len(found[key.fd])
                    found[key.fd] += data[:room]
                    if len(data) > room:
                        self.too_much = True
                        return {descriptor: bytes(data) for descriptor, data in found.items()}
                    if not data:
                        open_pipes.discard(key.fd)
                        selector.unregister(key.fd)
        return {descriptor: bytes(data) for descriptor, data in found.items()}


def ended(job: Job, reader: Reader, *, may_be_lost: bool = False) -> dict[str, Any]:
    """Stop a job that still runs, wait until its processes are gone, and return what it said of its end."""
    job.stop()
    job.control.settimeout(_GRACE_S)
    with contextlib.suppress(TimeoutError):
        while job.receive():
            pass
    if "layer" in job.facts:
        layer, reason = job.facts["layer"], job.facts["reason"]
        raise SandboxUnavailable(
            f"sandbox: the layer {layer!r} is not to be had here ({reason}), so nothing was run. Let the kernel or the "
            f"container give it, or give it up by name: Sandbox(without=[{layer!r}])"
        )
    if "exit" not in job.facts and not (may_be_lost or reader.timed_out or reader.too_much):
        raise GradeError("sandbox: it was lost before it could say how its code ended")
    return job.facts
