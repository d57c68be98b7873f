"""From signals to rows, each worked by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain import data, feedback
from posttrain.core import ConfigError, DataError, Message, StopReason, ToolCall
from posttrain.feedback import FeedbackStore, Rules, export


def rows(store: FeedbackStore, kind: Any, **options: Any) -> list[tuple[Any, ...]]:
    report = export(store, kind, format="standard", **options)
    assert report.rows == len(report.records)
    names = [
        name for name in ("completion", "chosen", "rejected", "label") if report.rows and name in report.records[0]
    ]
    return [tuple(record[name] for name in names) for record in report.records]


def test_a_correction_teaches_twice(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a")
    said = say("a", "correction", "better")
    (row,) = export(store, "prompt_completion").records
    assert row["prompt"] == [{"role": "user", "content": "q a"}]
    assert row["completion"] == [{"role": "assistant", "content": "better"}]
    assert row["metadata"] == {
        "interaction_id": "a",
        "choice": 0,
        "model": "card",
        "model_name": "tiny",
        "weight_version": 0,
        "signal": "correction",
        "feedback_ids": [said.id],
    }
    assert rows(store, "preference") == [("better", "a.0")]
    assert rows(store, "unpaired_preference") == []
    (standard,) = export(store, "prompt_completion", format="standard").records
    assert standard["prompt"] == "<user>q a"


def test_thumbs(store: FeedbackStore, served: Any, say: Any) -> None:
    for name, value in (("a", True), ("b", False)):
        served(name)
        say(name, "thumb", value)
    served("c")
    assert rows(store, "prompt_completion") == [("a.0",)]
    assert rows(store, "unpaired_preference") == [("a.0", True), ("b.0", False)]
    assert rows(store, "preference") == []


def test_ratings_by_threshold(store: FeedbackStore, served: Any, say: Any) -> None:
    for value in (1, 2, 3, 4, 5):
        served(str(value))
        say(str(value), "rating", value)
    assert rows(store, "unpaired_preference") == [("1.0", False), ("2.0", False), ("4.0", True), ("5.0", True)]
    strict = Rules(good_rating=5, bad_rating=4)
    assert [label for _, label in rows(store, "unpaired_preference", rules=strict)] == [False] * 4 + [True]


def test_an_outcome_label_can_vote(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a")
    say("a", "label", True, name="resolved")
    assert rows(store, "unpaired_preference") == []
    assert rows(store, "unpaired_preference", rules=Rules(outcome="resolved")) == [("a.0", True)]
    assert rows(store, "unpaired_preference", rules=Rules(outcome="other")) == []


def test_the_latest_of_a_source_wins_even_if_it_arrives_first(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a")
    say("a", "thumb", False, created_s=20.0)
    say("a", "thumb", True, created_s=10.0)
    assert rows(store, "unpaired_preference") == [("a.0", False)]
    say("a", "thumb", True, created_s=20.0)  # at the same time: the later to arrive
    assert rows(store, "unpaired_preference") == [("a.0", True)]


def test_sources_vote_and_disagreement_is_counted(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a")
    for source, value in (("x", True), ("y", True), ("z", False)):
        say("a", "thumb", value, source=source)
    served("b")
    say("b", "thumb", True, source="x")
    say("b", "rating", 1, source="y")
    report = export(store, "unpaired_preference")
    assert [(row["completion"][0]["content"], row["label"]) for row in report.records] == [("a.0", True)]
    assert report.conflicts == {"vote": 2}
    assert report.skipped == {"tie between sources": 1}
    assert report.signals == {"vote": 1}


def test_one_source_has_one_vote(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a")
    say("a", "thumb", True, source="x")
    say("a", "rating", 5, source="x")
    say("a", "thumb", False, source="y")
    assert rows(store, "unpaired_preference") == []  # 1 : 1, not 2 : 1
    say("a", "rating", 1, source="x")  # x has thought again
    assert rows(store, "unpaired_preference") == [("a.0", False)]


def test_most_sources_choose_the_correction_of_equals_the_latest(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a")
    for source, text in (("x", "one"), ("y", "two"), ("z", "one")):
        say("a", "correction", text, source=source)
    served("b")
    say("b", "correction", "old", source="x")
    say("b", "correction", "new", source="y")
    report = export(store, "prompt_completion", format="standard")
    assert [row["completion"] for row in report.records] == ["one", "new"]
    assert report.records[0]["metadata"]["feedback_ids"] == ["f1", "f3"]
    assert report.conflicts == {"correction": 2}


def test_preferences_by_majority_over_both_directions(store: FeedbackStore, served: Any, say: Any) -> None:
    for name in "abcd":
        served(name, prompt_tokens=(1,))
    say("a", "preferred", rejected_id="b", source="x")
    say("b", "preferred", rejected_id="a", source="y")
    say("a", "preferred", rejected_id="b", source="z")
    say("c", "preferred", rejected_id="d", source="x")
    say("d", "preferred", rejected_id="c", source="y")
    report = export(store, "preference", format="standard")
    assert [(row["chosen"], row["rejected"]) for row in report.records] == [("a.0", "b.0")]
    assert report.records[0]["metadata"]["rejected_interaction_id"] == "b"
    assert report.records[0]["metadata"]["feedback_ids"] == ["f1", "f3"]
    assert report.conflicts == {"preferred": 2}
    assert report.skipped == {"tie between sources": 1}
    say("b", "preferred", rejected_id="a", source="x")  # x and y now against z
    assert rows(store, "preference") == [("b.0", "a.0")]


def test_ties_are_votes_on_both(store: FeedbackStore, served: Any, say: Any) -> None:
    for name in "abcd":
        served(name)
    say("a", "preferred", "tie_good", rejected_id="b")
    say("c", "preferred", "tie_bad", rejected_id="d")
    assert rows(store, "preference") == []
    assert rows(store, "unpaired_preference") == [("a.0", True), ("b.0", True), ("c.0", False), ("d.0", False)]


def test_answers_to_different_prompts_make_no_pair(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a")
    served("b")
    say("a", "preferred", rejected_id="b")
    assert export(store, "preference").skipped == {"different prompts": 1}


def test_choices_with_differing_signals_make_pairs(store: FeedbackStore, served: Any, say: Any) -> None:
    for choice in range(4):
        served("a", choice)
    say("a", "thumb", True, choice=0)
    say("a", "thumb", False, choice=1)
    say("a", "rating", 3, choice=2)
    say("a", "rating", 3.5, choice=3)
    # 0 over 1 by thumbs; 3 over 2 by ratings; a thumb and a middling rating do not compare
    assert rows(store, "preference") == [("a.0", "a.1"), ("a.3", "a.2")]
    say("a", "preferred", rejected_id="a", choice=1, rejected_choice=0)  # said outright: it counts more
    assert rows(store, "preference") == [("a.1", "a.0"), ("a.3", "a.2")]


def test_choices_of_other_prompts_make_no_pairs(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a", 0, prompt_tokens=(1,))
    served("a", 1, prompt_tokens=(2,))
    say("a", "thumb", True, choice=0)
    say("a", "thumb", False, choice=1)
    assert rows(store, "preference") == []


def test_unfinished_and_clipped_answers(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a", stop_reason=StopReason.CANCELLED)
    served("b", stop_reason=StopReason.LENGTH)
    for name in "ab":
        say(name, "thumb", True)
    report = export(store, "prompt_completion")
    assert report.rows == 0
    assert report.skipped == {"clipped at max_tokens": 1, "unfinished (cancelled)": 1}
    assert rows(store, "prompt_completion", keep_clipped=True) == [("b.0",)]
    say("a", "correction", "whole")
    assert rows(store, "prompt_completion") == [("whole",)]
    assert rows(store, "preference") == []


def test_an_answer_without_text_is_no_row(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a", text="  ")
    say("a", "thumb", True)
    for format in ("conversational", "standard"):
        report = export(store, "prompt_completion", format=format)
        assert (report.rows, report.skipped) == (0, {"empty answer": 1})
    say("a", "correction", "whole")
    assert rows(store, "prompt_completion") == [("whole",)]
    assert export(store, "preference").skipped == {"empty answer": 1}


def test_a_correction_that_changes_nothing_is_no_preference(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a")
    say("a", "correction", "a.0")
    assert export(store, "preference").skipped == {"identical answers": 1}
    assert rows(store, "prompt_completion") == [("a.0",)]


def test_plain_prompts_need_the_standard_format(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a", messages=None)
    say("a", "thumb", True)
    report = export(store)
    assert (report.rows, report.skipped) == (0, {"plain-text prompt in a conversational data set": 1})
    assert rows(store, "prompt_completion") == [("a.0",)]


def test_filters(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a", created_s=50.0)
    served("b", model="other")
    served("c", model_name="big")
    for name in "abc":
        say(name, "thumb", True)
    assert rows(store, "prompt_completion") == [("a.0",), ("b.0",), ("c.0",)]
    assert rows(store, "prompt_completion", since_s=60.0) == [("b.0",), ("c.0",)]
    assert rows(store, "prompt_completion", model="other") == [("b.0",)]
    assert rows(store, "prompt_completion", model="big") == [("c.0",)]


def test_tool_calls_and_tools_are_kept(store: FeedbackStore, served: Any, say: Any) -> None:
    response = Message(role="assistant", tool_calls=(ToolCall(name="f", arguments={"x": "me@y.org"}, id="1"),))
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    served("a", metadata={"response": response.to_dict(), "tools": tools})
    say("a", "thumb", True)
    (row,) = export(store).records
    assert row["completion"][0]["tool_calls"] == [
        {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": "[EMAIL]"}}}
    ]
    assert row["tools"] == tools


def test_redaction_is_counted_and_can_be_turned_off(store: FeedbackStore, served: Any, say: Any) -> None:
    served("a", text="write to a@b.org or c@d.org")
    say("a", "thumb", True)
    report = export(store, format="standard")
    assert report.records[0]["completion"] == "write to [EMAIL] or [EMAIL]"
    assert report.redactions == {"EMAIL": 2}
    plain = export(store, format="standard", redact=False)
    assert plain.records[0]["completion"] == "write to a@b.org or c@d.org"
    assert plain.redactions == {}


@pytest.mark.parametrize("kind", ["prompt_completion", "preference", "unpaired_preference"])
@pytest.mark.parametrize("format", ["conversational", "standard"])
def test_files_are_what_the_data_room_reads(
    store: FeedbackStore, served: Any, say: Any, tmp_path: Path, kind: Any, format: Any
) -> None:
    for choice in (0, 1):
        served("a", choice)
        say("a", "thumb", choice == 0, choice=choice)
    served("b")
    say("b", "correction", "better")
    say("b", "thumb", False)
    out = tmp_path / "sub" / "rows.jsonl"
    report = export(store, kind, out=out, format=format)
    assert report.path == str(out)
    assert report.records == ()
    typed = {"prompt_completion": "completion", "unpaired_preference": "unpaired"}.get(kind, kind)
    loaded = data.load(out, kind=typed)
    assert len(loaded) == report.rows > 0
    first = json.loads(out.read_text().splitlines()[0])
    found = data.detect(first)
    assert found.type.value == kind
    assert found.conversational is (format == "conversational")


def test_the_same_store_gives_the_same_bytes_in_order_of_creation(
    store: FeedbackStore, served: Any, say: Any, tmp_path: Path
) -> None:
    for name, created_s in (("b", 3.0), ("a", 3.0), ("z", 1.0)):
        served(name, created_s=created_s)
        say(name, "thumb", True)
    assert rows(store, "prompt_completion") == [("z.0",), ("a.0",), ("b.0",)]
    for name in ("one", "two"):
        export(store, out=tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_failed_export_leaves_the_old_file(store: FeedbackStore, served: Any, say: Any, tmp_path: Path) -> None:
    served("a")
    say("a", "thumb", True)
    out = tmp_path / "rows.jsonl"
    export(store, out=out)
    before = out.read_bytes()
    served("b", metadata={"response": {"role": "nobody"}})
    say("b", "thumb", True)
    with pytest.raises(DataError):
        export(store, out=out)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.glob("*rows*")] == ["rows.jsonl"]


def test_unknown_kinds_and_formats(store: FeedbackStore) -> None:
    wrong: Callable[..., Any] = export
    with pytest.raises(ConfigError, match="kind must be one of"):
        wrong(store, "pairs")
    with pytest.raises(ConfigError, match="format must be one of"):
        wrong(store, format="xml")


def test_agreement_and_kappa_by_hand(store: FeedbackStore, served: Any, say: Any) -> None:
    # Cohen's table: both up 20, both down 15, only x up 5, only y up 10 → p_o 0.7, p_e 0.5, kappa 0.4
    said = [(True, True)] * 20 + [(False, False)] * 15 + [(True, False)] * 5 + [(False, True)] * 10
    for number, (x, y) in enumerate(said):
        served(f"c{number}")
        say(f"c{number}", "thumb", x, source="x")
        say(f"c{number}", "thumb", y, source="y")
    say("c0", "label", "b", name="intent", source="x")
    say("c0", "label", "b", name="intent", source="y")
    label, thumb = feedback.agreement(store)
    assert (label.name, label.n, label.agreement, label.kappa) == ("intent", 1, 1.0, None)
    assert (thumb.name, thumb.sources, thumb.n) == ("thumb", ("x", "y"), 50)
    assert thumb.agreement == pytest.approx(0.7)
    assert thumb.kappa == pytest.approx(0.4)
    say("c1", "preferred", rejected_id="c2", source="x")
    say("c2", "preferred", rejected_id="c1", source="y")
    assert feedback.agreement(store)[1].agreement == 0.0


def test_the_door() -> None:
    assert feedback.__all__ == sorted(feedback.__all__)
    assert all(getattr(feedback, name) is not None for name in feedback.__all__)
