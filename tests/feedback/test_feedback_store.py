"""The store: exactness, refusals, threads, restarts, pages, and plans that use the indexes."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.core import DataError, Feedback, Interaction, Sampling, ServeError, StopReason
from posttrain.feedback import FeedbackStore, check_feedback
from posttrain.feedback.store import FIRST_SINCE


def test_an_interaction_comes_back_bit_for_bit(store: FeedbackStore, served: Callable[..., Interaction]) -> None:
    written = served(
        "c1",
        tokens=(0, 2**31 - 1, 7),
        logprobs=(-1e-300, -0.1, -1234.5678901234567),
        text="ünï\x00\n☃",
        metadata={"a": [1, {"b": None}]},
        stop_reason=StopReason.STOP,
        sampling=Sampling(stop=("x",), seed=2**62),
    )
    assert store.interaction("c1") == written
    odd = served("c2", logprobs=(math.nan, -math.inf, 0.0))
    read = store.interaction("c2")
    assert math.isnan(read.logprobs[0])
    assert read.logprobs[1:] == odd.logprobs[1:]
    assert store.interaction("c1", choice=1) is None
    assert store.choices("none") == []


def test_logging_again_is_harmless_changing_is_refused(
    store: FeedbackStore, served: Callable[..., Interaction]
) -> None:
    first = served("c1")
    assert store.log_many([first, first]) == 0
    with pytest.raises(DataError, match="'c1', choice 0"):
        store.log(first.replace(text="other"))
    with pytest.raises(DataError, match="c1"):  # all or none
        store.log_many([first.replace(id="c2"), first.replace(tokens=(9,))])
    assert store.counts().interactions == 1


def test_an_impossible_token_names_the_interaction(store: FeedbackStore, served: Callable[..., Interaction]) -> None:
    with pytest.raises(DataError, match="interaction 'c1', choice 0"):
        served("c1", tokens=(2**40,))


def test_feedback_needs_a_completion(store: FeedbackStore, served: Any, say: Any) -> None:
    served("c1")
    with pytest.raises(ServeError, match="no completion 'c2' with choice 0"):
        say("c2", "thumb", True)
    with pytest.raises(ServeError, match="'c1' with choice 3"):
        say("c1", "thumb", True, choice=3)
    with pytest.raises(ServeError, match="'c9'"):
        say("c1", "preferred", rejected_id="c9")
    assert store.counts().feedback == 0
    say("c1", "thumb", True, id="same")
    with pytest.raises(ServeError, match="'same' is already stored"):
        say("c1", "thumb", False, id="same")
    assert store.counts().kinds == {"thumb": 1}


@pytest.mark.parametrize(
    ("kind", "value", "more"),
    [
        ("thumb", 1, {}),
        ("thumb", "up", {}),
        ("thumb", None, {}),
        ("rating", True, {}),
        ("rating", math.nan, {}),
        ("rating", math.inf, {}),
        ("rating", "5", {}),
        ("correction", "", {}),
        ("correction", 3, {}),
        ("label", None, {"name": "x"}),
        ("label", True, {}),
        ("label", math.nan, {"name": "x"}),
        ("preferred", None, {}),
        ("preferred", True, {"rejected_id": "d"}),
        ("preferred", None, {"rejected_id": "c"}),
        ("thumb", True, {"rejected_id": "d"}),
        ("thumb", True, {"choice": -1}),
    ],
)
def test_values_must_fit_their_kind(kind: Any, value: Any, more: dict[str, Any]) -> None:
    with pytest.raises(ServeError, match="feedback"):
        check_feedback(Feedback(id="f", completion_id="c", kind=kind, value=value, **more))


def test_feedback_is_found_from_both_sides(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a")
    served("b")
    pair = say("a", "preferred", rejected_id="b")
    thumb = say("b", "thumb", False)
    assert store.feedback_for("a") == [pair]
    assert store.feedback_for("b") == [pair, thumb]
    assert list(store.all_feedback()) == [pair, thumb]
    assert list(store.all_feedback("thumb")) == [thumb]


def test_pages_neither_repeat_nor_skip(store: FeedbackStore, served: Any) -> None:
    for number in range(25):
        served(f"c{number:02}", model=f"m{number % 2}", model_name="tiny", created_s=float(100 - number))
    seen, cursor = [], None
    while True:
        page = store.interactions(limit=4, cursor=cursor)
        seen += [item.id for item in page.items]
        served(f"late{len(seen)}") if len(seen) == 12 else None
        if page.next_cursor is None:
            break
        cursor = page.next_cursor
    assert seen == [f"c{number:02}" for number in range(25)] + ["late12"]
    assert [item.id for item in store.interactions(model="m1", limit=3).items] == ["c01", "c03", "c05"]
    assert len(store.interactions(model="tiny").items) == 26
    assert store.interactions(model="none").items == ()
    assert [item.id for item in store.interactions(since_s=99.0).items] == ["c00", "c01", "late12"]
    assert store.interactions(since_s=1000.0).items == ()
    with pytest.raises(ServeError, match="limit"):
        store.interactions(limit=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 10)), max_size=12), st.integers(1, 5), st.floats(0, 10))
def test_pages_are_the_filtered_list(tmp_path_factory: Any, make: Any, rows: Any, limit: int, since_s: float) -> None:
    with FeedbackStore(tmp_path_factory.mktemp("pages") / "s.db") as store:
        store.log_many(make(str(n), model="ab"[flag], created_s=time) for n, (flag, time) in enumerate(rows))
        seen, cursor = [], None
        while True:
            page = store.interactions("a", since_s, limit=limit, cursor=cursor)
            seen += [item.id for item in page.items]
            cursor = page.next_cursor
            if cursor is None:
                break
    assert seen == [str(n) for n, (flag, time) in enumerate(rows) if not flag and time >= since_s]


def test_threads_write_and_read_at_once(store: FeedbackStore, served: Any) -> None:
    def work(worker: int) -> None:
        for number in range(20):
            id = f"w{worker}-{number}"
            served(id)
            store.add(Feedback(id=f"f-{id}", completion_id=id, kind="thumb", value=True))
            assert store.interaction(id) is not None

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert (store.counts().interactions, store.counts().feedback) == (160, 160)


def test_what_was_acknowledged_survives_kill_nine(tmp_path: Path) -> None:
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[2]); from conftest import answer\n"
        "from pathlib import Path; from posttrain.feedback import FeedbackStore\n"
        "store = FeedbackStore(Path(sys.argv[1]))\n"
        "for number in range(10): store.log(answer(f'c{number}'))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    path = tmp_path / "store.db"
    done = subprocess.run([sys.executable, "-c", program, str(path), str(Path(__file__).parent)], check=False)
    assert done.returncode == -9
    with FeedbackStore(path) as store:
        assert [item.id for item in store.interactions().items] == [f"c{number}" for number in range(10)]


def test_two_stores_on_one_file(tmp_path: Path, store: FeedbackStore, served: Any) -> None:
    served("c1")
    with FeedbackStore(store.path) as other:
        assert other.counts().interactions == 1
        other.add(Feedback(id="f", completion_id="c1", kind="thumb", value=True))
    assert store.counts().feedback == 1


def test_other_files_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database" * 100)
    with pytest.raises(DataError, match="not a feedback store"):
        FeedbackStore(text)
    assert text.read_text() == "not a database" * 100
    newer = tmp_path / "newer.db"
    FeedbackStore(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(DataError, match="version 2"):
        FeedbackStore(newer)
    strange = tmp_path / "strange.db"
    with sqlite3.connect(strange) as connection:
        connection.execute("CREATE TABLE other (x)")
    with pytest.raises(DataError, match="version 0"):
        FeedbackStore(strange)


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "s.db")
    store.close()
    with pytest.raises(DataError, match=r"s\.db"):
        store.counts()


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT body FROM interactions WHERE id = 'x' AND choice = 0",
        "SELECT body FROM interactions WHERE seq > 5 AND model = 'm' ORDER BY seq LIMIT 10",
        FIRST_SINCE.replace("?", "5"),
        "SELECT body FROM feedback WHERE completion_id = 'x' OR rejected_id = 'x' ORDER BY seq",
        "SELECT kind, count(*) FROM feedback GROUP BY kind ORDER BY kind",
    ],
)
def test_queries_use_an_index(store: FeedbackStore, sql: str) -> None:
    with sqlite3.connect(store.path) as connection:
        plan = " ".join(row[3] for row in connection.execute("EXPLAIN QUERY PLAN " + sql))
    assert "INDEX" in plan
    assert "SCAN interactions" not in plan
