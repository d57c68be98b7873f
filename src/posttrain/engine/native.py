"""Compiles the engine's one piece of C, decode_attention.c, for the machine at hand.

PyTorch has no attention kernel made for one query per row over a cache of ragged lengths on a CPU; this one is several
times faster. It is compiled once (about a second), kept in the user's cache folder and loaded with ctypes. Where there
is no C compiler, or POSTTRAIN_NATIVE=0, the engine uses PyTorch's kernels instead: same results up to rounding.
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
from collections.abc import Callable
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("decode_attention.c")
# No -ffast-math: a row of NaN must come out as NaN.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_MACROS = {torch.float32: (), torch.bfloat16: ("-DBF16",)}
_LONG = ctypes.c_long
_POINTER = ctypes.c_void_p
_ARGUMENTS = (
    *(_POINTER, _LONG) * 3,  # queries, new keys, new values, each with its row stride
    *(_POINTER, _POINTER, _LONG, _LONG),  # the cache's keys and values, strides of slot and head
    *(_POINTER, _POINTER),  # lengths, output
    *(_LONG,) * 5,  # rows, J, G, K, window
    ctypes.c_int,  # threads
)

_log = logging.getLogger(__name__)


@functools.cache
def decode_attention(dtype: torch.dtype) -> Callable[..., int] | None:
    """The compiled kernel for one type of cache, or None where it cannot be had (the reason is logged)."""
    if os.environ.get("POSTTRAIN_NATIVE") == "0" or dtype not in _MACROS:
        return None
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None or not _SOURCE.exists():
        _log.info("no C compiler or no %s: decoding attends with PyTorch's kernels, which is slower", _SOURCE.name)
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler, _MACROS[dtype])))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("%s could not be compiled, decoding will be slower: %s", _SOURCE.name, error)
        return None
    kernel: Callable[..., int] = library.decode_attention
    kernel.argtypes = _ARGUMENTS  # type: ignore[attr-defined]
    kernel.restype = ctypes.c_int  # type: ignore[attr-defined]
    return kernel


def _compiled(compiler: str, macros: tuple[str, ...]) -> Path:
    """The shared library, compiled now unless this machine has it already."""
    # -march=native in a home folder shared by different machines: the processor is part of the name.
    identity = "\0".join([compiler, *_FLAGS, *macros, _processor(), _SOURCE.read_text(encoding="utf-8")])
    name = f"decode_attention-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    folder = _cache_folder()
    target = folder / name
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / name
        command = [compiler, *_FLAGS, *macros, "-o", str(made), str(_SOURCE), "-lm"]
        # OpenMP where the compiler has it: PyTorch has loaded the same runtime, so both share its threads.
        for extra in (["-fopenmp"], []):
            result = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=120, check=False)
            if result.returncode == 0:
                made.replace(target)
                return target
    raise OSError(f"{compiler} failed: {result.stderr.strip()[-300:]}")


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
