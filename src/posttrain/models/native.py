"""Compiles the package's few pieces of C for the machine at hand.

Each is the part of a computation for which PyTorch has no good CPU kernel. It is compiled once (a second or two), kept
in the user's cache folder and loaded with ctypes. Where there is no C compiler, or POSTTRAIN_NATIVE=0, PyTorch's
kernels do the same work more slowly, with the same results up to rounding.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

# No -ffast-math: a row of NaN must come out as NaN.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")

_log = logging.getLogger(__name__)


@functools.cache
def load_native(source: Path, macros: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The library that a C file compiles to, or None where it cannot be had (the reason is logged).

    Args:
        source: the file; what it includes with quotes lies beside it.
        macros: compiler options, `-DBF16`.
    """
    if os.environ.get("POSTTRAIN_NATIVE") == "0":
        return None
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None or not source.exists():
        _log.info("no C compiler or no %s: PyTorch's kernels do its work, more slowly", source.name)
        return None
    try:
        return ctypes.CDLL(str(_compiled(source, compiler, macros)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s could not be compiled, its work will be slower: %s", source.name, error)
        return None


def _compiled(source: Path, compiler: str, macros: tuple[str, ...]) -> Path:
    """The shared library, compiled now unless this machine has it already."""
    # -march=native in a home folder shared by different machines: the processor is part of the name.
    identity = "\0".join([compiler, *_FLAGS, *macros, _processor(), *_texts(source)])
    name = f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    target = folder / name
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / name
        command = [compiler, *_FLAGS, *macros, "-o", str(made), str(source), "-lm"]
        # OpenMP where the compiler has it: PyTorch has loaded the same runtime, so both share its threads.
        for extra in (["-fopenmp"], []):
            result = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=120, check=False)
            if result.returncode == 0:
                made.replace(target)
                return target
    raise OSError(f"{compiler} failed: {result.stderr.strip()[-300:]}")


def _texts(source: Path) -> list[str]:
    """The file and what it includes from its own folder."""
    text = source.read_text(encoding="utf-8")
    included = [line.split('"')[1] for line in text.splitlines() if line.startswith('#include "')]
    return [text, *(part for name in included for part in _texts(source.with_name(name)))]


def _cache_folder() -> Path:
    """A folder of the user's own; one for this process where the home cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "posttrain" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return _process_folder()


@functools.cache
def _process_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="posttrain-native-"))


def _processor() -> str:
    """What tells one instruction set from another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
