"""The peers' virtual environment: made from a pinned file, once, and remade when the file changes."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

PACKAGES = ("torch", "transformers", "trl", "accelerate")


def peers_python(benchmarks: Path, given: Path | None = None) -> Path:
    """An interpreter that has the peers.

    Args:
        benchmarks: the folder with peers.txt; the environment is its `.venv`.
        given: another interpreter, taken as it is.
    """
    if given is not None:
        return given
    wanted = (benchmarks / "peers.txt").read_text(encoding="utf-8")
    folder = benchmarks / ".venv"
    python, stamp = folder / "bin" / "python", folder / "peers.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing the peers into {folder}", file=sys.stderr, flush=True)
    if not python.exists():
        venv.create(folder, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--requirement", str(benchmarks / "peers.txt")], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def versions(pythons: Mapping[str, Path]) -> dict[str, str]:
    """What each side runs on: side → "torch 2.13.0, …"."""
    script = (
        "import json, importlib.metadata as m, sys\n"
        "names = [d.metadata['Name'].lower() for d in m.distributions()]\n"
        f"print(json.dumps({{n: m.version(n) for n in {PACKAGES!r} if n in names}}))"
    )
    found = {}
    for side, python in pythons.items():
        done = subprocess.run([str(python), "-c", script], check=True, capture_output=True, text=True)
        installed = json.loads(done.stdout)
        names = PACKAGES if side != "ours" else PACKAGES[:1]
        found[side] = ", ".join(f"{name} {installed[name]}" for name in names if name in installed)
    return found
