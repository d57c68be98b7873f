"""What the comparisons with other libraries measure, as a table: `pytest tests/parity --parity-table FILE`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

_measured: dict[str, list[tuple[float, float]]] = defaultdict(list)  # of a test: |Δloss| and cosine of the gradients
OPENING = """# Parity

What each objective gives on the same tensors or the same tiny model as another library does, in fp32: the largest
difference of the loss and the smallest cosine between the gradients over all cases of a test. The tests ask for 1e-5
(relative for losses above 1) and 0.9999. A cosine of 1.0000000 is one that differs from 1 by less than 5e-8.

Made by `pytest tests/parity --parity-table docs/parity.md`, with {libraries}.

| comparison | cases | largest difference of losses | smallest cosine of gradients |
|---|---|---|---|
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-table", type=Path, help="write what was measured into this Markdown file")


@pytest.fixture(autouse=True)
def _measure(request: pytest.FixtureRequest) -> Iterator[None]:
    """Take over what a test put into its module's FIGURES."""
    figures: list[tuple[float, float]] = getattr(request.module, "FIGURES", [])
    figures.clear()
    yield
    _measured[_title(request.node)].extend(figures)


def _title(node: Any) -> str:
    """Of one loss where the parameters name losses, of the whole test otherwise."""
    module = node.module.__name__.rpartition(".")[2].removeprefix("test_parity_").replace("_", " ")
    words = node.originalname.removeprefix("test_").replace("_", " ")
    name = getattr(node, "callspec", None) and node.callspec.params.get("name")
    return f"{module}: {words}" + (f", `{name}`" if name else "")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--parity-table")
    rows = {title: figures for title, figures in _measured.items() if figures}
    if not path or not rows:
        return
    libraries = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "peft", "torch"))
    lines = [
        f"| {title} | {len(figures)} | {max(figure[0] for figure in figures):.1e} "
        f"| {min(figure[1] for figure in figures):.7f} |"
        for title, figures in sorted(rows.items())
    ]
    path.write_text(OPENING.format(libraries=libraries) + "\n".join(lines) + "\n", encoding="utf-8")
