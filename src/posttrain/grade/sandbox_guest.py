"""What runs inside a sandbox: a program, a command, or one of the two halves of `sandbox_judge`.

Imports the standard library only; see `sandbox_worker`.
"""

from __future__ import annotations

import atexit
import builtins
import fcntl
import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import NoReturn

_HIGH = 40
_ENVIRONMENT = {"HOME": "/tmp/work", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "TMPDIR": "/tmp/work"}


def arrange_descriptors(wanted: list[int]) -> list[int]:
    """Make the first two standard output and error, the others 3, 4 …, and close all else. Returns 3, 4 …"""
    raised = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _HIGH) for descriptor in wanted]
    for number, descriptor in enumerate(raised, 1):
        os.dup2(descriptor, number)
    os.closerange(len(raised) + 1, 65536)
    return list(range(3, len(raised) + 1))


def run(role: str, descriptors: list[int]) -> NoReturn:
    """Do what the payload says, in the role that the job has."""
    with os.fdopen(descriptors[0], "rb") as file:
        payload = json.loads(file.read())
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    for folder in payload.get("search", ()):
        sys.path.append(folder)
    importlib.invalidate_caches()
    for name, text in payload.get("files", {}).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    _standard_input(payload.get("stdin", ""))
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
    sys.argv = ["program.py"]
    builtins.__dict__.update(exit=sys.exit, quit=sys.exit)  # which the module `site` would have put there
    if role == "command":
        os.execvpe(payload["argv"][0], payload["argv"], _ENVIRONMENT)
    if role == "program":
        status = _run_program(payload["program"])
        _run_down()
        _end(status)
    halves = sys.modules["sandbox_judge"]  # put there by the worker, which has loaded it from beside this file
    if role == "candidate":
        _end(halves.Candidate(descriptors[1]).serve(payload["program"]))
    _end(halves.Judge(descriptors[1], descriptors[2]).judge(payload))


def _standard_input(text: str) -> None:
    Path("/tmp/.stdin").write_text(text, encoding="utf-8")
    descriptor = os.open("/tmp/.stdin", os.O_RDONLY)
    os.dup2(descriptor, 0)
    if descriptor:
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115


def _end(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # noqa: BLE001  the code may have replaced or closed it
            status = status or 1
    os._exit(status & 0xFF)


def _run_program(program: str) -> int:
    """As `python program.py` would; returns the exit status."""
    module = types.ModuleType("__main__")
    module.__dict__["__file__"] = "program.py"
    sys.modules["__main__"] = module
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001  what the program raises is its result
        import traceback

        traceback.print_exc()
        return 1
    return 0


def _run_down() -> None:
    """What the interpreter does at its end: wait for threads, then call what was registered with `atexit`."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001  the program's last words may raise anything; its status stands
        return
