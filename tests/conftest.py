"""A PostgreSQL server of the tests' own, for the rooms that need one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "postgres.sh"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A DSN without a database: of a server on a folder and a socket, by the role that owns everything.

    POSTTRAIN_TEST_POSTGRES names another server, whose role may create roles and databases.
    """
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (the extra postgres)")
    if named := os.environ.get("POSTTRAIN_TEST_POSTGRES"):
        yield named
        return
    if subprocess.run(["bash", _SCRIPT, "find"], capture_output=True).returncode:
        pytest.skip(
            "no PostgreSQL server is installed (apt-get install postgresql), and POSTTRAIN_TEST_POSTGRES is not set"
        )
    started = subprocess.run(["bash", _SCRIPT, "start"], capture_output=True, text=True, timeout=300)
    assert started.returncode == 0, started.stderr
    folder = started.stdout.strip()
    try:
        yield f"host={folder} user=owner"
    finally:
        subprocess.run(["bash", _SCRIPT, "remove", folder], check=True, capture_output=True, timeout=120)
