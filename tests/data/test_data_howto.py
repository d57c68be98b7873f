"""The examples of the how-to page run as they stand there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto_data.md"


def test_every_example_runs(jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = [{"prompt": f"p{index}", "completion": f"c{index}"} for index in range(20)]
    jsonl(plain, "sft.jsonl")
    jsonl([{**row, "more": 1} for row in plain], "more.jsonl")
    jsonl([{"prompt": "p", "chosen": "a", "rejected": "b"}], "pairs.jsonl")
    jsonl([{"question": "6 * 7?", "answer": "#### 42"}], "gsm8k.jsonl")
    jsonl([*plain[:9], {"prompt": "p"}], "messy.jsonl")
    (tmp_path / "mine.csv").write_text("frage,antwort\np,c\n")
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) >= 8
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), names)
    assert names["tasks"][0].answer == "42"  # type: ignore[index]
    assert json.loads((tmp_path / "bad.jsonl").read_text())["field"] == "completion"
    assert len(names["different"]) == 20  # type: ignore[arg-type]


def test_the_page_names_every_canonical_column_and_format() -> None:
    from posttrain.data.formats import SIGNATURES, TARGETS

    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{target}`" in page for target in TARGETS)
    columns = {column for _, signature in SIGNATURES for column in signature}
    unnamed = {column for column in columns if f"`{column}`" not in page}
    assert unnamed == {"conversation", "kto_tag", "Body", "Question", "Answer", "test_list"}
