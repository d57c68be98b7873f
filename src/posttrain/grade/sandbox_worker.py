"""The process that makes sandboxes. Run by its path, with an empty environment; imports the standard library only.

It reads jobs from a socket: limits, never a program. What the code under test is and prints goes through file
descriptors that come with the job and that this process closes unread, so nothing of one job is in its memory when the
next begins.

    this process ── outer (outside; watches the caller and the clock, kills)
                      └── entrant (enters the namespaces, makes the root)
                            └── init (process 1 inside; when it ends, all inside end)
                                  └── guest (runs the code)

Descriptors of a job, in this order: control, payload, standard output, standard error, and those for the guest.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

_MAX_DESCRIPTORS = 8
_LOOK_S = 0.05  # between looks at what several processes hold together
_WARM = "bisect collections copy datetime decimal fractions functools hashlib heapq itertools math operator random re"


def _sibling(name: str) -> ModuleType:
    """A file beside this one, without its folder on the search path, where it would hide the standard library's."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


kernel = _sibling("sandbox_kernel")
guest = _sibling("sandbox_guest")
_sibling("sandbox_judge")


def main() -> None:
    """Fork one sandbox for each message until the socket is closed."""
    jobs = socket.socket(fileno=int(sys.argv[1]))
    for name in [*_WARM.split(), "statistics", "string", "typing"]:
        __import__(name)
    with contextlib.suppress(kernel.LayerError):  # on another processor the job says so
        for spawn in (False, True):
            kernel.encoded_filter(os.uname().machine, spawn)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps what has ended
    gc.collect()
    gc.disable()  # until the code runs
    gc.freeze()  # a child that collects garbage must not copy what it shares with this process
    while True:
        message, descriptors, _, _ = socket.recv_fds(jobs, 65536, _MAX_DESCRIPTORS)
        if not message:
            return
        if os.fork() == 0:
            jobs.close()
            _outer(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _outer(job: dict[str, Any], descriptors: list[int]) -> NoReturn:
    """Map the entrant's users; then wait until it ends, the caller goes, or the time is over."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    control = descriptors[0]
    as_root = os.geteuid() == 0
    from_entrant, to_outer = os.pipe()
    from_outer, to_entrant = os.pipe()
    entrant = os.fork()
    if entrant == 0:
        os.close(from_entrant)
        os.close(to_entrant)
        _guarded(control, lambda: _enter(job, descriptors, as_root, to_outer, from_outer))
    for descriptor in (to_outer, from_outer, *descriptors[1:]):
        os.close(descriptor)
    try:
        if os.read(from_entrant, 1):
            if "user" in job["layers"]:
                kernel.map_users(entrant, as_root=as_root)
            os.write(to_entrant, b"x")
            _watch(job, entrant, from_entrant, control)
    except kernel.LayerError as error:
        _report(control, {"layer": error.args[0], "reason": error.args[1]})
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(OSError):
            kill(entrant, signal.SIGKILL)  # init dies with it, and all inside with init
    os.waitpid(entrant, 0)
    os._exit(0)


def _watch(job: dict[str, Any], entrant: int, from_entrant: int, control: int) -> None:
    """Wait until the entrant ends, the caller goes, the time is over, or its processes hold too much memory together.

    The entrant holds the other end of `from_entrant`; it and the caller's going away both wake this process.
    """
    deadline_s = time.monotonic() + job["wall_s"]
    together = job["spawn"] and "limits" in job["layers"]
    shared_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    while (remaining_s := deadline_s - time.monotonic()) > 0:
        if select.select([from_entrant, control], [], [], min(remaining_s, _LOOK_S if together else remaining_s))[0]:
            return
        if together and (held := kernel.resident_bytes(entrant, shared_bytes)) > job["memory_bytes"]:
            _report(control, {"exit": -int(signal.SIGKILL), "cpu_s": 0.0, "memory_bytes": held})
            return


def _enter(job: dict[str, Any], descriptors: list[int], as_root: bool, to_outer: int, from_outer: int) -> NoReturn:
    """Enter the namespaces, make the root, and wait for init."""
    layers = set(job["layers"])
    kernel.libc.prctl(1, int(signal.SIGKILL), 0, 0, 0)
    os.setsid()
    kernel.enter_namespaces(layers)
    os.write(to_outer, b"x")
    if not os.read(from_outer, 1):
        os._exit(1)
    os.close(from_outer)
    if as_root and "user" in layers:
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    if "mount" in layers:
        kernel.make_root(job["readable"], job["disk_bytes"])
    else:
        os.chdir("/")
    alive, lives = os.pipe()
    init = os.fork()
    if init == 0:
        os.close(to_outer)
        os.close(lives)
        _guarded(descriptors[0], lambda: _init(job, descriptors, as_root, alive))
    for descriptor in (alive, *descriptors):
        os.close(descriptor)
    os.waitpid(init, 0)
    os._exit(0)


def _init(job: dict[str, Any], descriptors: list[int], as_root: bool, alive: int) -> NoReturn:
    """Give up all rights, start the guest, wait for it, and say how it ended."""
    layers = set(job["layers"])
    control, payload, out, err, *others = descriptors
    kernel.become_nobody(layers, as_root=as_root)
    kernel.die_with_parent()
    if select.select([alive], [], [], 0)[0]:
        os._exit(1)  # the entrant was gone before its death could be this one's
    if "limits" in layers:
        kernel.set_limits({name: value for name, value in job["limits"].items() if name != "RLIMIT_CPU"})
    from_guest, to_init = os.pipe()
    child = os.fork()
    if child == 0:
        _guest(job, payload, out, err, others, to_init)
    for descriptor in (payload, out, err, to_init, *others):
        os.close(descriptor)
    # Said before any of the code runs, so the code cannot say it.
    complaint = os.read(from_guest, 1000)
    if complaint != b"in place":
        layer, _, reason = complaint.decode(errors="replace").partition(": ")
        raise kernel.LayerError(layer or "setup", reason or "the guest ended early")
    _report(control, {"begun": True})  # from here on the caller's clock runs
    while True:
        pid, status = os.wait()
        if pid == child:
            break
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = {"exit": os.waitstatus_to_exitcode(status), "cpu_s": usage.ru_utime + usage.ru_stime}
    _report(control, {**facts, "memory_bytes": usage.ru_maxrss * 1024})
    os._exit(0)


def _guest(job: dict[str, Any], payload: int, out: int, err: int, others: list[int], to_init: int) -> NoReturn:
    """Keep the job's own descriptors only, put the last layers in place, and run the code."""
    kept = guest.arrange_descriptors([out, err, payload, to_init, *others])
    to_init = kept.pop(1)
    layers = set(job["layers"])
    try:
        kernel.libc.prctl(4, 0, 0, 0, 0)  # not dumpable: what runs beside it may not look into it
        if "limits" in layers:
            kernel.set_limits({"RLIMIT_CPU": job["limits"]["RLIMIT_CPU"]})
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        if "seccomp" in layers:
            kernel.filter_calls(spawn=job["spawn"])
    except kernel.LayerError as error:
        os.write(to_init, f"{error.args[0]}: {error.args[1]}".encode())
        os._exit(1)
    os.write(to_init, b"in place")
    os.close(to_init)
    gc.enable()
    guest.run(job["role"], kept)
    raise AssertionError("the guest came back")


def _guarded(control: int, work: Any) -> NoReturn:
    """Do a step; where it fails, say which layer could not be had and end, with nothing run."""
    try:
        work()
    except kernel.LayerError as error:
        _report(control, {"layer": error.args[0], "reason": error.args[1]})
    except BaseException as error:  # noqa: BLE001  a forked process must never return into the loop of its parent
        _report(control, {"layer": "setup", "reason": f"{type(error).__name__}: {error}"})
    os._exit(1)


def _report(control: int, facts: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        os.write(control, json.dumps(facts).encode() + b"\n")


if __name__ == "__main__":
    main()
