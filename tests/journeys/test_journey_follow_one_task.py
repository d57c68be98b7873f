"""The page that follows one task is what its script does today."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The page as it is kept, and as the script makes it now."""
    spec = importlib.util.spec_from_file_location("follow_one_task", DOCS / "follow_one_task.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made: str = script.walk(tmp_path_factory.mktemp("walk").resolve())
    return script.PAGE.read_text(encoding="utf-8"), made


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)\n```", page, re.DOTALL)


def prose(page: str) -> str:
    """Everything but the records; sampled scores and sizes aside."""
    without = re.sub(r"```json\n.*?\n```", "", page, flags=re.DOTALL)
    return re.sub(r"The siblings' scores: .*", "", without)


def fields(value: Any, path: str = "") -> set[str]:
    """The paths of all fields, with the type of what is there; how long a list is does not count."""
    if isinstance(value, dict):
        return {each for key, item in value.items() for each in fields(item, f"{path}.{key}")}
    if isinstance(value, list):
        return {each for item in value if not str(item).startswith("… ") for each in fields(item, f"{path}[]")}
    return {f"{path}: {'number' if isinstance(value, int | float) else type(value).__name__}"}


def test_prose_and_calls_are_up_to_date(pages: tuple[str, str]) -> None:
    kept, made = pages
    assert prose(kept) == prose(made), "run: python docs/follow_one_task.py"


def test_records_are_up_to_date(pages: tuple[str, str]) -> None:
    kept, made = ([json.loads(block) for block in blocks(page, "json")] for page in pages)
    assert len(kept) == len(made) == 16
    varying = re.compile(r"^\.(rationale|text|messages\[\]|metadata)")  # what a wrong answer has and a right one lacks
    for old, new in zip(kept, made, strict=True):
        differing = {each for each in fields(old) ^ fields(new) if not varying.match(each)}
        assert not differing, f"run: python docs/follow_one_task.py ({differing})"
    assert kept[:3] == made[:3], "what no weight decides is the same to the letter"


def test_the_page_goes_round(pages: tuple[str, str]) -> None:
    records = [json.loads(block) for block in blocks(pages[1], "json")]
    kinds = [record.get("record", "").partition("/")[0] for record in records]
    assert [kind for kind in kinds if kind] == [
        "prompt_row", "task", "trajectory", "grade", "example", "checkpoint", "eval_report", "model_card",
        "promotion", "interaction", "feedback", "task",
    ]  # fmt: skip
    first, last = records[1], records[-1]
    assert (last["prompt"], last["answer"]) == (first["prompt"], first["answer"])
    trajectory, promotion, served, heard, exported = (records[number] for number in (4, 11, 12, 13, 14))
    assert trajectory["task"] == first
    assert served["model"] == promotion["card"]["id"] == exported["metadata"]["model"]
    assert heard["completion_id"] == served["id"] == exported["metadata"]["interaction_id"]
    assert exported["metadata"]["feedback_ids"] == [heard["id"]]
    assert served["weight_version"] == 1, "the policy that is served has made its step"


def test_the_page_names_no_machine(pages: tuple[str, str]) -> None:
    for page in pages:
        assert "/tmp" not in page
        assert str(Path.home()) + "/" not in page
