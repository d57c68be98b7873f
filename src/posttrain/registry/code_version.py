"""Which code made an artifact: package version, and the git commit where the package runs from a checkout."""

from __future__ import annotations

import functools
import subprocess
from importlib import metadata
from pathlib import Path

TIMEOUT_S = 5.0


@functools.cache
def code_version() -> dict[str, str]:
    """`{"posttrain": "0.1.0", "commit": "<40 hex>" or "<40 hex>-dirty"}`; no commit outside a checkout.

    The package may be installed in a virtual environment inside somebody else's repository, so a commit counts only
    where git itself tracks this very file.
    """
    found = {"posttrain": _package_version()}
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return found
    commit = _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    if commit:
        found["commit"] = commit
    return found


def _package_version() -> str:
    try:
        return metadata.version("posttrain")
    except metadata.PackageNotFoundError:
        return "unknown"


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
