from __future__ import annotations

import gzip
import json
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain import data
from posttrain.core import DataError, MissingExtraError, UsageError

ROWS = [{"prompt": f"question {index} — ü\u2028", "completion": f"answer {index}"} for index in range(7)]


def values(path: Path | str, **options: object) -> list[dict[str, object]]:
    return [row.values for row in data.read_rows(path, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson"])
def test_json_lines_keep_values_and_line_numbers(jsonl: Callable[..., Path], name: str) -> None:
    path = jsonl([ROWS[0], "", *ROWS[1:]], name)
    rows = list(data.read_rows(path))
    assert [row.values for row in rows] == ROWS
    assert [row.line for row in rows] == [1, 3, 4, 5, 6, 7, 8]
    assert {row.file for row in rows} == {name}


def test_json_array_object_of_rows_and_misnamed_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS))
    assert values(path) == ROWS
    path.write_text(json.dumps({"canary": "x", "examples": ROWS}))
    assert values(path) == ROWS
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert values(path) == ROWS
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    assert values(packed) == ROWS
    path.write_text('[{"a": 1}, {"a": ]')
    with pytest.raises(DataError, match=r"a\.json: not valid JSON"):
        values(path)
    path.write_text("3")
    with pytest.raises(DataError, match="a JSON array of objects is needed, not int"):
        values(path)


def test_csv_with_bom_quotes_newlines_and_long_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "x" * 200_000
    path.write_bytes(b"\xef\xbb\xbf" + f'prompt,answer\n"two\nlines, ""quoted""",{long}\nnext,2\n'.encode())
    rows = list(data.read_rows(path))
    assert rows[0].values == {"prompt": 'two\nlines, "quoted"', "answer": long}
    assert [row.line for row in rows] == [2, 4]
    path.write_text("prompt,answer\na,b\n", encoding="utf-16")
    assert values(path) == [{"prompt": "a", "answer": "b"}]
    tabs = tmp_path / "a.tsv"
    tabs.write_text("prompt\tanswer\na,1\tb\n")
    assert values(tabs) == [{"prompt": "a,1", "answer": "b"}]
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(b"prompt\na\n"))
    assert values(packed) == [{"prompt": "a"}]


def test_csv_faults_say_what_and_where(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("prompt\nMünchen\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8 near line .*convert the file"):
        values(path)
    path.write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match="two columns are called 'a'"):
        values(path)
    path.write_text('a,b\n1,"2\n')
    with pytest.raises(DataError, match=r"a\.csv:\d+: not valid CSV"):
        values(path)
    path.write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(DataError, match=r"a\.csv:3: wrong number of CSV cells: 3 where the header has 2"):
        values(path)
    path.write_text("a,b\n")
    with pytest.raises(DataError, match="no rows"):
        values(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        values(tmp_path / name)


def test_damaged_gzip(tmp_path: Path) -> None:
    random.seed(0)
    lines = "".join(json.dumps({"text": f"{random.random()}"}) + "\n" for _ in range(5000)).encode()
    whole = gzip.compress(lines)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: the gzip file ends too early"):
        values(path)
    path.write_bytes(lines)
    with pytest.raises(DataError, match="not a sound gzip file"):
        values(path)
    path.write_bytes(whole[:200] + b"\x00\xff\x00\xff" * 50 + whole[400:])
    with pytest.raises(DataError, match="not a sound gzip file"):
        values(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_columnar_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1 this is not such a file at all, but long enough to be one")
    with pytest.raises(DataError, match="not a sound"):
        values(tmp_path / name)


def test_broken_lines_raise_or_are_handed_over(jsonl: Callable[..., Path]) -> None:
    path = jsonl([{"text": "a"}, '{"text": "b"', "[1]", '{"text": "\\ud800"}', '{"text": "c", "score": NaN}'])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: broken JSON"):
        values(path)
    bad: list[data.BadRow] = []
    good = [row.values["text"] for row in data.read_rows(path, on_bad=bad.append)]
    assert good == ["a", "c"]
    assert [(row.line, row.cause) for row in bad] == [
        (2, "broken JSON"),
        (3, "not a JSON object"),
        (4, "lone surrogate"),
    ]
    assert bad[0].raw == '{"text": "b"'
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not UTF-8"):
        values(path)
    path.write_text('{"text": "a"}\n', encoding="utf-16")
    with pytest.raises(DataError, match="is UTF-16"):
        values(path)


def test_limit(jsonl: Callable[..., Path]) -> None:
    path = jsonl(ROWS)
    assert values(path, limit=3) == ROWS[:3]
    with pytest.raises(UsageError, match="limit must be 1 or more"):
        values(path, limit=0)


def test_folder_glob_and_splits(jsonl: Callable[..., Path], tmp_path: Path) -> None:
    jsonl(ROWS[:2], "set/train-00000-of-00002.jsonl")
    jsonl(ROWS[2:3], "set/train-00001-of-00002.jsonl.gz")
    jsonl(ROWS[3:], "set/test-00000-of-00001.jsonl")
    (tmp_path / "set" / "README.md").write_text("hello")
    with pytest.raises(DataError, match="has splits test, train: choose one with split="):
        values(tmp_path / "set")
    assert values(tmp_path / "set", split="train") == ROWS[:3]
    assert values(tmp_path / "set", split="test") == ROWS[3:]
    with pytest.raises(DataError, match="no split 'dev'; there are test, train"):
        values(tmp_path / "set", split="dev")
    assert values(str(tmp_path / "set" / "train-*")) == ROWS[:3]
    with pytest.raises(DataError, match="no data file matches"):
        values(str(tmp_path / "*.parquet"))
    with pytest.raises(DataError, match="no such file or folder"):
        values(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="not a known type of data file"):
        values(tmp_path / "set" / "README.md")
    with pytest.raises(DataError, match="says 'test', not split 'train'"):
        values(tmp_path / "set" / "test-00000-of-00001.jsonl", split="train")


def test_parquet_and_arrow(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    messages = [
        [{"role": "user", "content": "hi", "name": None}],
        [{"role": "assistant", "content": "yo", "name": "bot"}],
    ]
    table = pa.table({"messages": messages * 200, "score": [1.5, None] * 200})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=150)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=130)
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=170)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        rows = list(data.read_rows(tmp_path / name))
        assert len(rows) == 400
        assert [row.line for row in rows] == list(range(1, 401))
        # a struct field that is null is left out: only the schema put it there
        assert rows[0].values == {"messages": [{"role": "user", "content": "hi"}], "score": 1.5}
        assert rows[399].values == {"messages": messages[1], "score": None}


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"posttrain\[data\]"):
        values(tmp_path / "a.parquet")


def peak_bytes(path: Path, kind: str | None = None) -> tuple[int, int]:
    """Most memory in use while all rows are read, and how many there are."""
    tracemalloc.start()
    try:
        rows = data.read_rows(path) if kind is None else data.stream(path, kind=kind)  # type: ignore[call-overload]
        count = sum(1 for _ in rows)
        return tracemalloc.get_traced_memory()[1], count
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["big.jsonl", "big.jsonl.gz", "big.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    peaks = []
    for num_rows in (300, 6_000):  # 1.5 MB and 30 MB
        path = tmp_path / name
        line = "a,b\n" if name.endswith(".csv") else json.dumps({"prompt": "p" * 2500, "completion": "c" * 2500}) + "\n"
        body = "p" * 2500 + "," + "c" * 2500 + "\n" if name.endswith(".csv") else line
        text = ((line.replace("a,b", "prompt,completion") if name.endswith(".csv") else "") + body * num_rows).encode()
        path.write_bytes(gzip.compress(text, 1) if name.endswith(".gz") else text)
        del text
        peak, count = peak_bytes(path, kind="completion")
        assert count == num_rows
        peaks.append(peak)
    assert peaks[1] < 1_000_000, f"30 MB read with a peak of {peaks[1]} bytes"
    assert peaks[1] < peaks[0] + 200_000


def test_memory_of_parquet_stays_at_a_row_group(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table({"text": [f"{index:06d}" * 170 for index in range(30_000)]})  # 30 MB
    pq.write_table(table, tmp_path / "big.parquet", row_group_size=500, compression="NONE", use_dictionary=False)
    del table
    before, peak, count = pa.total_allocated_bytes(), 0, 0
    for count, _ in enumerate(data.read_rows(tmp_path / "big.parquet"), 1):
        if count % 100 == 0:
            peak = max(peak, pa.total_allocated_bytes() - before)
    assert count == 30_000
    assert peak < 6_000_000
