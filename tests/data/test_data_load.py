from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain import data
from posttrain.core import DataError, UsageError, assistant, system, user

Write = Callable[..., Path]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LONGER = [*CHAT, {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]


def one(write: Write, row: dict[str, Any], **options: Any) -> data.TypedRow:
    """The only typed row of a file of one row, without its id."""
    loaded = data.load(write([row]), **options)
    assert len(loaded) == 1
    assert loaded[0].id == "rows.jsonl:1"
    return loaded[0].replace(id="x")


CONVERSIONS: list[tuple[dict[str, Any], str | None, data.TypedRow]] = [
    ({"text": "t"}, None, data.TextRow(id="x", text="t")),
    ({"messages": CHAT}, None, data.CompletionRow(id="x", prompt=(user("q"),), completion=(assistant("a"),))),
    (
        {"messages": LONGER, "system": "s"},
        "completion",
        data.CompletionRow(
            id="x", prompt=(system("s"), user("q")), completion=(assistant("a"), user("q2"), assistant("a2"))
        ),
    ),
    (
        {"messages": LONGER, "topic": "t"},
        "prompt",
        data.PromptRow(id="x", prompt=(user("q"), assistant("a"), user("q2")), answer="a2", facts={"topic": "t"}),
    ),
    ({"prompt": "p", "completion": " c"}, None, data.CompletionRow(id="x", prompt="p", completion=" c")),
    ({"prompt": "p", "completion": " c"}, "text", data.TextRow(id="x", text="p c")),
    ({"prompt": "p", "completion": "c"}, "prompt", data.PromptRow(id="x", prompt="p", answer="c")),
    (
        {"prompt": "p", "completion": CHAT[1:]},
        None,
        data.CompletionRow(id="x", prompt=(user("p"),), completion=(assistant("a"),)),
    ),
    (
        {"prompt": "p", "response": "c", "system": "s"},
        None,
        data.CompletionRow(id="x", prompt=(system("s"), user("p")), completion=(assistant("c"),)),
    ),
    ({"prompt": "p", "answer": 3.0, "n": 1}, None, data.PromptRow(id="x", prompt="p", answer="3", facts={"n": 1})),
    (
        {"prompt": "p", "completion": "c", "label": 0},
        None,
        data.LabelRow(id="x", prompt="p", completion="c", label=False),
    ),
    (
        {"messages": LONGER, "label": True},
        None,
        data.LabelRow(
            id="x", prompt=(user("q"), assistant("a"), user("q2")), completion=(assistant("a2"),), label=True
        ),
    ),
    (
        {"prompt": "p", "completions": ["s1", "s2"], "labels": [1, False]},
        None,
        data.StepsRow(id="x", prompt="p", completions=("s1", "s2"), labels=(True, False)),
    ),
    (
        {"instruction": "i", "input": "n", "output": "o", "history": [["h", "g"]]},
        None,
        data.CompletionRow(id="x", prompt=(user("h"), assistant("g"), user("i\n\nn")), completion=(assistant("o"),)),
    ),
    (
        {"question": "6 * 7?", "answer": "It is 6 * 7 = 1,042.\n#### 1,042"},
        None,
        data.PromptRow(id="x", prompt="6 * 7?", answer="1042", facts={"solution": "It is 6 * 7 = 1,042.\n#### 1,042"}),
    ),
    (
        {"question": "6 * 7?", "answer": "so\n#### 42"},
        "completion",
        data.CompletionRow(id="x", prompt="6 * 7?", completion="so\n#### 42"),
    ),
    (
        {"problem": "p", "solution": "s", "answer": "\\frac12"},
        "completion",
        data.CompletionRow(id="x", prompt="p", completion="s"),
    ),
    (
        {"Body": "Ann has 3.", "Question": "How many?", "Answer": 3.0},
        None,
        data.PromptRow(id="x", prompt="Ann has 3. How many?", answer="3"),
    ),
    (
        {"question": "who?", "answer": ["Ann", "Anne"]},
        None,
        data.PromptRow(id="x", prompt="who?", answer="Ann", facts={"answers": ["Ann", "Anne"]}),
    ),
    (
        {"passage": "P", "question": "q", "options": ["(A)one", "(B) two"], "label": "B", "answer": None},
        None,
        data.PromptRow(
            id="x",
            prompt="P\n\nq",
            answer="two",
            facts={"passage": "P", "choices": ["one", "two"], "gold": 1, "letter": "B"},
        ),
    ),
]


@pytest.mark.parametrize(("row", "kind", "expected"), CONVERSIONS)
def test_conversions(jsonl: Write, row: dict[str, Any], kind: str | None, expected: data.TypedRow) -> None:
    assert one(jsonl, row, kind=kind) == expected


def test_rows_survive_the_way_through_json() -> None:
    for _, _, row in CONVERSIONS:
        assert type(row).from_json(row.to_json()) == row
        assert json.loads(row.to_json())["record"].endswith("/1")


def test_self_instruct_instances_become_several_rows(jsonl: Write) -> None:
    loaded = data.load(jsonl([{"instruction": "i", "instances": [{"input": "", "output": str(n)} for n in range(3)]}]))
    assert [row.id for row in loaded] == ["rows.jsonl:1/0", "rows.jsonl:1/1", "rows.jsonl:1/2"]
    assert (loaded.report.num_read, loaded.report.num_clean, loaded.report.num_rows) == (1, 1, 3)


def test_columns(jsonl: Write) -> None:
    path = jsonl([{"q": "p", "a": "c", "key": n} for n in range(3)])
    loaded = data.load(path, columns="prompt=q,completion=a,id=key", kind="completion")
    assert loaded[2] == data.CompletionRow(id="2", prompt="p", completion="c")
    with pytest.raises(DataError, match=r"rows\.jsonl: no column 'z' \(for prompt\); columns present: q, a, key"):
        data.load(path, columns={"prompt": "z"})
    with pytest.raises(DataError, match=r"rows\.jsonl: no known data format has the columns q, a, key"):
        data.load(path)
    twice = jsonl([{"q": "p", "a": "c", "key": 1}] * 2)
    with pytest.raises(DataError, match="1 ids stand in several rows, '1' for one"):
        data.load(twice, columns="prompt=q,completion=a,id=key")
    faulty = data.load(jsonl([{"q": 3, "a": "c"}]), columns="prompt=q,completion=a", max_bad=1)
    assert faulty.report.bad[0].field == "q", "faults speak of the file's own column"


def test_names_and_ids(jsonl: Write, tmp_path: Path) -> None:
    path = jsonl([{"text": "a"}], "set/part.jsonl")
    assert data.load(path)[0].id == "part.jsonl:1"
    assert data.load(path, name="web")[0].id == "web:1"
    jsonl([{"text": "b"}], "set/more/part.jsonl")
    assert [row.id for row in data.load(tmp_path / "set")] == ["more/part.jsonl:1", "part.jsonl:1"]
    assert [row.id for row in data.load(tmp_path / "set", name="web")] == ["web/more/part.jsonl:1", "web/part.jsonl:1"]


BAD: list[tuple[Any, str, str]] = [
    ('{"prompt": "p", ', "", "broken JSON"),
    ({"prompt": "p"}, "completion", "is missing"),
    ({"prompt": "p", "completion": None}, "completion", "is null"),
    ({"prompt": "p", "completion": "  "}, "completion", "is empty"),
    ({"prompt": 3, "completion": "c"}, "prompt", "is not a list of messages"),
    ({"prompt": "p", "completion": [{"role": "user", "content": "c"}]}, "completion", "does not begin and end with"),
    ({"prompt": CHAT, "completion": "c"}, "prompt", "ends with an assistant turn"),
    ('{"prompt": "p", "completion": "\\udc00"}', "", "lone surrogate"),
    ({"prompt": "p", "completion": "c", "tools": "[{]"}, "tools", "has text that should be JSON and is not"),
    ("[]", "", "not a JSON object"),
    ({"prompt": "<image> what is it?", "completion": "c", "images": ["a.png"]}, "images", "holds media"),
]


def test_quarantine_tells_file_line_field_cause_and_row(jsonl: Write, tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "p", "completion": "c"}] * 11 + [row for row, _, _ in BAD]
    path = jsonl(rows)
    aside = tmp_path / "aside" / "bad.jsonl"
    loaded = data.load(path, quarantine=aside, max_bad=0.5)
    assert len(loaded) == 11
    written = [data.BadRow.from_json(line) for line in aside.read_bytes().splitlines()]
    assert len(written) == len(BAD) == loaded.report.num_bad
    for number, (bad, (row, field, cause)) in enumerate(zip(written, BAD, strict=True), 12):
        assert (bad.file, bad.line, bad.field) == ("rows.jsonl", number, field)
        assert bad.cause.startswith(cause)
        assert bad.raw == (row if isinstance(row, str) else json.dumps(row)), "the row can be mended and put back"
    assert loaded.report.bad == tuple(written)
    assert "22 rows read, 11 used, 11 bad (50.0 %)" in loaded.report.summary()
    with pytest.raises(DataError) as caught:
        data.load(path, quarantine=aside)
    assert "more bad rows than max_bad=0.05 allows" in str(caught.value)
    assert "1 × completion: is empty (rows.jsonl:15)" in str(caught.value)
    data.load(jsonl([rows[0]]), quarantine=aside)
    assert aside.read_bytes() == b"", "a clean pass leaves no stale bad rows behind"


def test_max_bad_is_a_share_that_may_be_reached(jsonl: Write) -> None:
    good, bad = {"text": "t"}, {"text": ""}
    assert len(data.load(jsonl([good] * 19 + [bad]))) == 19
    with pytest.raises(DataError, match="more bad rows"):
        data.load(jsonl([good] * 18 + [bad]))
    with pytest.raises(DataError, match="more bad rows"):
        data.load(jsonl([good] * 1000 + [bad]), max_bad=0)
    with pytest.raises(UsageError, match="max_bad is a share"):
        data.load(jsonl([good]), max_bad=5)
    with pytest.raises(UsageError, match="kind 'sft' is not known"):
        data.load(jsonl([good]), kind="sft")  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="would be read as data"):
        data.load(jsonl([good]).parent, quarantine=jsonl([good]).parent / "bad.jsonl")


def test_a_file_that_begins_with_broken_lines(jsonl: Write) -> None:
    loaded = data.load(jsonl(["{"] * 40 + [{"text": "t"}] * 2), max_bad=1)
    assert len(loaded) == 2
    assert loaded.report.num_bad == 40
    with pytest.raises(DataError, match="3 × broken JSON"):
        data.load(jsonl(["{"] * 3))


def test_one_odd_first_row_does_not_decide_the_format(jsonl: Write) -> None:
    loaded = data.load(jsonl([{"prompt": "p", "chosen": "c"}] + [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 30))
    assert loaded.kind == "preference"
    assert [(bad.line, bad.field, bad.cause) for bad in loaded.report.bad] == [(1, "rejected", "is missing")]


def test_a_folder_may_hold_several_formats_of_one_kind(jsonl: Write, tmp_path: Path) -> None:
    jsonl([{"prompt": "p", "completion": "c"}], "set/a.jsonl")
    jsonl([{"instruction": "i", "output": "o"}], "set/b.jsonl")
    loaded = data.load(tmp_path / "set")
    assert loaded.kind == "completion"
    assert loaded.report.formats == ("prompt_completion", "alpaca")
    jsonl([{"chosen": "a b", "rejected": "a c", "text": "t"}], "set/c.jsonl")
    jsonl([{"text": "t"}], "set/d.jsonl")
    with pytest.raises(
        DataError, match=r"d\.jsonl: rows with the columns text are language_modeling: they become text"
    ):
        data.load(tmp_path / "set")


def test_csv_labels_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\np,c,True\np,d,0\np,e,maybe\n")
    loaded = data.load(path, max_bad=0.5)
    assert [row.label for row in loaded] == [True, False]
    assert loaded.report.causes == {"label: is not a label": 1}
    path.write_text(
        'messages\n"[{""role"": ""user"", ""content"": ""q""}, {""role"": ""assistant"", ""content"": ""a""}]"\n'
    )
    assert data.load(path)[0].completion == (assistant("a"),)


def test_stream_reads_anew_counts_and_stops_early(jsonl: Write) -> None:
    path = jsonl([{"text": str(n)} for n in range(50)] + [{"text": ""}])
    rows = data.stream(path)
    assert [row.id for row in rows] == [row.id for row in rows] == [f"rows.jsonl:{n}" for n in range(1, 51)]
    assert (rows.report.num_read, rows.report.num_clean, rows.report.num_bad) == (51, 50, 1)
    many = data.stream(jsonl([{"text": "t"}] * 1000 + [{"text": ""}] * 500))
    with pytest.raises(DataError, match="1053 rows read, 1000 used, 53 bad"):
        list(many)
    with pytest.raises(DataError, match="no such file"):
        data.stream(path.parent / "absent.jsonl")


def test_values_that_json_cannot_hold_are_bad_rows(jsonl: Write) -> None:
    escaped = json.dumps({"name": "f", "arguments": {"x": "\ud800"}})
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": escaped}]
    loaded = data.load(jsonl([{"conversations": turns}]), max_bad=1)
    assert loaded.report.causes == {"lone surrogate": 1}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
ROW = st.dictionaries(st.sampled_from(["prompt", "completion", "tools", "system", "y"]), JSON, max_size=4)
LINE = st.one_of(
    st.builds(json.dumps, ROW),
    st.text(alphabet=st.characters(blacklist_characters="\n\r", blacklist_categories=["Cs"]), max_size=20),
    st.just('{"prompt": "p", "completion": "c"}'),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINE, max_size=12))
def test_every_row_is_either_clean_or_in_the_quarantine(tmp_path: Path, lines: list[str]) -> None:
    lines = ['{"prompt": "p", "completion": "c"}'] * 33 + lines  # decide the format
    path, aside = tmp_path / "rows.jsonl", tmp_path / "bad.jsonl"
    path.write_bytes("".join(line + "\n" for line in lines).encode())
    loaded = data.load(path, kind="completion", max_bad=1, quarantine=aside)
    report = loaded.report
    total = sum(1 for line in lines if line.encode().strip())
    assert report.num_read == total == report.num_clean + report.num_bad
    assert report.num_rows == len(loaded) == report.num_clean
    written = [msgspec.json.decode(line, type=data.BadRow) for line in aside.read_bytes().splitlines()]
    assert len(written) == report.num_bad == sum(report.causes.values())
    used = {int(row.id.rpartition(":")[2]) for row in loaded}
    aside_lines = {bad.line for bad in written}
    assert not used & aside_lines
    assert used | aside_lines == {number for number, line in enumerate(lines, 1) if line.encode().strip()}
    for row in loaded:
        assert row.prompt
        assert row.completion
        assert data.CompletionRow.from_json(row.to_json()) == row
