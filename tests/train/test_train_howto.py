"""The how-to page does what it says: its code is run, block by block, as a reader would."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto_objective.md"


def test_add_an_objective_runs():
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["trainer"].num_steps == 5
    assert len(text.splitlines()) <= 60, "the page is long: shorten the code it explains"
