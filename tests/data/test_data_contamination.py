from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import data
from posttrain.core import Task, UsageError, assistant, system, user
from posttrain.data.words import ngram_hashes, words

A20 = " ".join(f"a{index}" for index in range(20))


def check(training: object, evaluation: object, **options: object) -> data.ContaminationReport:
    return data.check_contamination(training, evaluation, **options)  # type: ignore[arg-type]


def test_words_are_normalised() -> None:
    assert words("The ＣＡＴ's naïve—café_au 3.14 lait!") == [
        "the",
        "cat",
        "s",
        "naïve",
        "café",
        "au",
        "3",
        "14",
        "lait",
    ]
    assert words("我喜欢 GPT4 吗") == ["我", "喜", "欢", "gpt4", "吗"]
    assert words("ﬁne STRASSE straße") == ["fine", "strasse", "strasse"]


def test_ngram_hashes() -> None:
    tokens = [f"w{index}" for index in range(10)]
    hashes = ngram_hashes(tokens, 4)
    assert len(hashes) == len(set(hashes.tolist())) == 7
    assert hashes[3] == ngram_hashes(tokens[3:7], 4)[0]
    assert ngram_hashes(tokens[:4][::-1], 4)[0] != hashes[0], "order counts"
    assert len(ngram_hashes(tokens, 11)) == 0
    # fixed, so that reports are the same on every machine: blake2b of b"w0", big-endian
    assert ngram_hashes(["w0"], 1)[0] == 0x4E879DF7533A0A93


@pytest.mark.parametrize(
    ("num_shared", "matches", "coverage"),
    [
        (7, False, 0.0),  # no 8-gram at all
        (10, False, 0.5),  # exactly half is not more than half
        (11, True, 0.55),
        (20, True, 1.0),
    ],
)
def test_coverage_of_one_run(num_shared: int, matches: bool, coverage: float) -> None:
    # The training text shares the first num_shared of 20 words: they are covered by num_shared - 7 overlapping 8-grams.
    training = " ".join(A20.split()[:num_shared]) + " then something else entirely " * 3
    report = check([training], [A20])
    assert [(found.kind, found.coverage) for found in report.matches] == ([("ngram", coverage)] if matches else [])
    assert report.dropped == (("0",) if matches else ())
    assert report.clean == (() if matches else ("0",))
    exact_half = check([training], [A20], threshold=coverage - 0.01 if coverage else 0.0)
    assert [found.coverage for found in exact_half.matches] == ([coverage] if coverage else [])


def test_two_runs_add_up_within_one_document_only() -> None:
    tokens = A20.split()
    first, last = " ".join(tokens[:8]), " ".join(tokens[12:])
    together = check([f"{last} and {first}"], [A20])  # 16 of 20 words, in the other order
    assert [found.coverage for found in together.matches] == [0.8]
    assert check([first, last], [A20]).matches == (), "8 of 20 words each: the rule asks for one document"
    overlapping = " ".join(tokens[:9]) + " x " + " ".join(tokens[2:12])
    assert [found.coverage for found in check([overlapping], [A20]).matches] == [0.6], "words 0 to 11, none twice"


def test_direction() -> None:
    question = " ".join(A20.split()[:10])
    book = question + " " + " ".join(f"b{index}" for index in range(90))
    # The book holds the whole question; the question makes up a tenth of the book.
    assert [found.coverage for found in check([book], [question]).matches] == [1.0]
    assert check([book], [question], of="training").matches == ()
    assert [found.coverage for found in check([book], [question], of="training", threshold=0.05).matches] == [0.1]
    # A short document cut out of a long evaluation instance: the other way round.
    assert check([question], [book]).matches == ()
    assert [found.coverage for found in check([question], [book], of="training").matches] == [1.0]


def test_short_texts_match_as_a_whole_only() -> None:
    report = check(["What is  2 + 2?", "what is 2+2", "WHAT IS 2 + 2?"], ["What is 2 + 2?", ""])
    assert [(found.train_id, found.kind, found.coverage) for found in report.matches] == [
        ("0", "exact", 1.0),
        ("2", "exact", 1.0),
    ]
    assert report.sets["evaluation"] == data.SetShare(num=2, num_matched=1, num_short=2)
    assert "2 have fewer than 8 words" in report.summary()


def test_sets_ids_rows_and_tasks() -> None:
    training = [
        data.CompletionRow(id="sft:1", prompt=(system("be kind"), user(A20)), completion=(assistant("so it is"),)),
        data.PreferenceRow(id="dpo:1", prompt="unrelated", chosen=f"well: {A20}", rejected="no"),
        data.TextRow(id="web:1", text="nothing of the sort"),
    ]
    evaluation = {
        "easy": [Task(id="e1", prompt=(system("be kind"), user(A20.upper()))), Task(id="e2", prompt="other")],
        "hard": [("h1", "quite another text that has more than eight words in it")],
    }
    report = check(training, evaluation)
    assert [(found.train_id, found.evaluation_set, found.evaluation_id, found.kind) for found in report.matches] == [
        ("sft:1", "easy", "e1", "exact"),  # the prompts are equal
        ("dpo:1", "easy", "e1", "ngram"),  # the question stands in an answer
    ]
    assert report.dropped == ("sft:1", "dpo:1")
    assert report.clean == ("web:1",)
    assert {name: share.share for name, share in report.sets.items()} == {"easy": 0.5, "hard": 0.0}
    assert data.ContaminationReport.from_json(report.to_json()) == report
    assert "easy: 1 of 2 instances (50.0 %) are in the training data" in report.summary()


def test_wrong_use() -> None:
    for options in ({"ngram": 0}, {"threshold": 1.5}, {"of": "both"}):
        with pytest.raises(UsageError):
            check(["a"], ["b"], **options)
    with pytest.raises(UsageError, match="not one text"):
        check("a text", ["b"])
    with pytest.raises(UsageError, match="item 0 is int"):
        check([3], ["b"])
    assert check([], []).summary().endswith("0 of 0 training documents match")
    assert check(["a b c d e f g h i"], []).clean == ("0",)


def slow_coverage(covered: str, by: str, ngram: int) -> float:
    """The definition, word by word."""
    tokens, other = words(covered), words(by)
    grams = {tuple(other[at : at + ngram]) for at in range(len(other) - ngram + 1)}
    hit = [False] * len(tokens)
    for at in range(len(tokens) - ngram + 1):
        if tuple(tokens[at : at + ngram]) in grams:
            hit[at : at + ngram] = [True] * ngram
    return sum(hit) / len(tokens) if tokens else 0.0


TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=14).map(" ".join), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(training=TEXTS, evaluation=TEXTS, ngram=st.integers(1, 4), of=st.sampled_from(["evaluation", "training"]))
def test_agrees_with_the_definition(training: list[str], evaluation: list[str], ngram: int, of: str) -> None:
    report = check(training, evaluation, ngram=ngram, threshold=0.4, of=of)
    found = {(int(m.train_id), int(m.evaluation_id)): m.coverage for m in report.matches if m.kind == "ngram"}
    expected = {}
    for at, document in enumerate(training):
        for index, instance in enumerate(evaluation):
            sides = (instance, document) if of == "evaluation" else (document, instance)
            coverage = slow_coverage(*sides, ngram)
            if coverage > 0.4 and document != instance:
                expected[at, index] = pytest.approx(coverage)
    assert found == expected


def test_overlaps_planted_in_gsm8k_are_found(shared: Callable[[str], Path]) -> None:
    training = data.load(shared("math/gsm8k_train.jsonl.gz"), name="train")
    evaluation = data.load(shared("math/gsm8k_test.jsonl.gz"), name="test")
    start = time.perf_counter()
    before = check(training, {"gsm8k": evaluation})
    seconds = time.perf_counter() - start
    assert before.num_training == 7473
    assert before.sets["gsm8k"].share < 0.02, "the public split is nearly clean"
    assert seconds < 20

    random.seed(5)
    planted = [row for row in random.sample(list(evaluation), 40) if len(words(str(row.prompt))) >= 30]
    altered: list[object] = []
    for index, row in enumerate(planted):
        tokens = str(row.prompt).split()
        if index % 4 == 0:
            altered.append((f"copy:{row.id}", str(row.prompt).upper()))  # equal but for case
        elif index % 4 == 1:  # a sentence before, the last quarter rewritten
            kept = " ".join(tokens[: 3 * len(tokens) // 4])
            altered.append((f"cut:{row.id}", f"Here is one more. {kept} and how many would there be at the end?"))
        elif index % 4 == 2:  # the question in the answer of a chat row
            altered.append(
                data.CompletionRow(id=f"chat:{row.id}", prompt="Give me a question.", completion=str(row.prompt))
            )
        else:  # every sixth word replaced: no run of eight remains
            altered.append(
                (f"new:{row.id}", " ".join("xyz" if at % 6 == 5 else word for at, word in enumerate(tokens)))
            )
    report = check([*training, *altered], {"gsm8k": evaluation})
    hits = {(found.train_id, found.evaluation_id): found for found in report.matches}
    for item in altered:
        item_id = item[0] if isinstance(item, tuple) else item.id  # type: ignore[attr-defined]
        how, _, evaluation_id = item_id.partition(":")
        if how == "new":
            assert item_id in report.clean
        else:
            assert hits[item_id, evaluation_id].kind == ("exact" if how == "copy" else "ngram")
            assert item_id in report.dropped
    assert len(report.clean) + len(report.dropped) == report.num_training == 7473 + len(altered)
    assert set(before.dropped) <= set(report.dropped)
