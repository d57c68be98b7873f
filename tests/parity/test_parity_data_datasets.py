"""Rows are those that `datasets` itself reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain import data
from posttrain.core import DataError, ToolCall

datasets = pytest.importorskip("datasets")

ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"q{index}"},
            {"role": "assistant", "content": f"a{index} ü"},
        ],
        "score": index / 4,
        "source": None if index % 3 else "web",
    }
    for index in range(2500)
]


def test_saved_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    rows = list(data.read_rows(tmp_path / "saved"))
    assert [row.values for row in rows] == datasets.load_from_disk(str(tmp_path / "saved")).to_list() == ROWS
    assert [row.line for row in rows[:2]] == [1, 2]
    loaded = data.load(tmp_path / "saved", kind="completion")
    assert len(loaded) == 2500
    assert len({row.id for row in loaded}) == 2500
    (tmp_path / "saved" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow, which is not there"):
        list(data.read_rows(tmp_path / "saved"))


def test_saved_dataset_with_splits(tmp_path: Path) -> None:
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS[:5]), "test": datasets.Dataset.from_list(ROWS[5:8])}
    )
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match="has splits train, test: choose one with split="):
        list(data.read_rows(tmp_path / "both"))
    assert [row.values for row in data.read_rows(tmp_path / "both", split="test")] == ROWS[5:8]
    assert [row.id for row in data.load(tmp_path / "both", split="test")] == [
        f"test/data-00000-of-00001.arrow:{line}" for line in (1, 2, 3)
    ]
    with pytest.raises(DataError, match="no split 'dev'; there are train, test"):
        list(data.read_rows(tmp_path / "both", split="dev"))
    selected = datasets.Dataset.from_list(ROWS).filter(lambda row: row["score"] > 600)
    selected.save_to_disk(str(tmp_path / "selected"))
    assert (
        [row.values for row in data.read_rows(tmp_path / "selected")]
        == selected.to_list()
        == [row for row in ROWS if row["score"] > 600]
    )


def test_files_as_datasets_reads_them(tmp_path: Path) -> None:
    source = datasets.Dataset.from_list([{**row, "source": row["source"] or "book"} for row in ROWS[:300]])
    source.to_json(str(tmp_path / "a.jsonl"), force_ascii=True)
    source.to_parquet(str(tmp_path / "a.parquet"))
    source.remove_columns("messages").to_csv(str(tmp_path / "a.csv"))
    for name in ("a.jsonl", "a.parquet"):
        assert [row.values for row in data.read_rows(tmp_path / name)] == source.to_list()
    cells = [row.values for row in data.read_rows(tmp_path / "a.csv")]
    assert [(float(row["score"]), row["source"]) for row in cells] == [
        (row["score"], row["source"]) for row in source.to_list()
    ]


def test_tool_arguments_are_free_of_the_other_rows_keys(tmp_path: Path) -> None:
    def row(**arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return {
            "messages": [
                {"role": "user", "content": "q", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ]
        }

    datasets.Dataset.from_list([row(city="Bern"), row(days=3)]).save_to_disk(str(tmp_path / "saved"))
    first, second = data.load(tmp_path / "saved", kind="completion")
    assert not isinstance(first.completion, str)
    assert not isinstance(second.completion, str)
    assert first.completion[0].tool_calls == (ToolCall(name="f", arguments={"city": "Bern"}),)
    assert second.completion[0].tool_calls == (ToolCall(name="f", arguments={"days": 3}),)
