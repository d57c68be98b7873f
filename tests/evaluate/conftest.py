"""Fixtures of the evaluation's tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode adds no folder of its own

from conftest_sums import hand_made

from posttrain.core import EvalReport


@pytest.fixture
def report_of() -> Callable[..., EvalReport]:
    """Makes reports from scores."""
    return hand_made
