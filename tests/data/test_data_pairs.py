from __future__ import annotations

from typing import Any

import pytest

from posttrain import data
from posttrain.core import assistant, system, user
from posttrain.data.convert import convert
from posttrain.data.formats import signature
from posttrain.data.rows import RowFault

U = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "good"}
B = {"role": "assistant", "content": "bad"}


def pair(values: dict[str, Any], kind: Any = "preference") -> data.PreferenceRow:
    found = signature(values, kind)
    assert found is not None
    rows = convert(values, *found, kind, "x")
    assert isinstance(rows[0], data.PreferenceRow)
    return rows[0]


def fault(values: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(RowFault) as caught:
        pair(values)
    return caught.value.field, caught.value.cause


EXPECTED = data.PreferenceRow(id="x", prompt=(user("q"),), chosen=(assistant("good"),), rejected=(assistant("bad"),))


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": [U], "chosen": [A], "rejected": [B]},
        {"prompt": [U], "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [A], "rejected": [B]},
        {"prompt": "q", "chosen": [U, A], "rejected": [U, B]},  # whole conversations beside a text prompt
        {"chosen": [U, A], "rejected": [U, B]},
        {"messages": [U], "chosen": A, "rejected": B},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    ],
)
def test_conversational_pairs(values: dict[str, Any]) -> None:
    assert pair(values) == EXPECTED


def test_text_pairs() -> None:
    expected = data.PreferenceRow(id="x", prompt="The sky is", chosen=" blue.", rejected=" black.")
    assert pair({"prompt": "The sky is", "chosen": " blue.", "rejected": " black."}) == expected
    # "bl" is common to both, but a prompt does not end within a word
    assert pair({"chosen": "The sky is blue.", "rejected": "The sky is black."}) == expected
    assert pair({"question": "q", "system": "s", "chosen": "a", "rejected": "b"}).prompt == (system("s"), user("q"))


def test_margin() -> None:
    values = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert pair(values).margin is None
    assert pair({**values, "margin": 0.5}).margin == 0.5
    assert pair({**values, "score_chosen": 9, "score_rejected": 6.5}).margin == 2.5
    assert fault({**values, "margin": "much"}) == ("margin", "is not a finite number")


def test_dialogue_of_several_turns() -> None:
    before = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\nlines"
    found = pair({"chosen": before + "\n\nAssistant: yes", "rejected": before + "\n\nAssistant: no"})
    assert found.prompt == (user("one"), assistant("two"), user("three\nlines"))
    assert (found.chosen, found.rejected) == ((assistant("yes"),), (assistant("no"),))
    parted = pair({"chosen": before + "\n\nAssistant: yes", "rejected": "\n\nHuman: one\n\nAssistant: no"})
    assert parted.prompt == (user("one"),)
    assert parted.chosen == (assistant("two"), user("three\nlines"), assistant("yes"))


@pytest.mark.parametrize(
    ("values", "field", "cause"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "rejected", "equals chosen"),
        ({"chosen": "q a", "rejected": "q a"}, "rejected", "equals chosen"),
        ({"chosen": [U, A], "rejected": [U, A]}, "rejected", "equals chosen"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "rejected", "is empty"),
        ({"chosen": "left", "rejected": "right"}, "prompt", "is missing"),
        ({"chosen": "it is", "rejected": "it is so"}, "chosen", "is empty"),
        ({"chosen": [A], "rejected": [B]}, "prompt", "is missing"),
        ({"chosen": [A], "rejected": "b"}, "rejected", "is of another form than chosen"),
        (
            {"chosen": [U, A], "rejected": [{"role": "user", "content": "other"}, B]},
            "chosen",
            "parts from the other side in another's turn",
        ),
        ({"chosen": [U, A], "rejected": [U, A, U, B]}, "chosen", "is empty"),
        ({"prompt": [U], "chosen": [U], "rejected": [B]}, "chosen", "does not begin and end with an assistant turn"),
        ({"prompt": [U, A], "chosen": [A], "rejected": [B]}, "prompt", "ends with an assistant turn"),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: ", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            "chosen",
            "has an empty assistant turn",
        ),
        ({"input": "q", "output_1": "a", "output_2": "b", "label": 3}, "label", "is not 1 or 2"),
        ({"input": "q", "output_1": "a", "output_2": "b", "label": True}, "label", "is not 1 or 2"),
    ],
)
def test_faults(values: dict[str, Any], field: str, cause: str) -> None:
    assert fault(values) == (field, cause)


def test_judgements_and_other_kinds() -> None:
    values = {"input": "q", "output_1": "a", "output_2": "b", "label": 2}
    assert pair(values) == data.PreferenceRow(id="x", prompt="q", chosen="b", rejected="a")
    (completion,) = convert(values, *signature(values), "completion", "x")  # type: ignore[misc]
    assert completion == data.CompletionRow(id="x", prompt="q", completion="b")
    assert data.unpair(pair(values)) == (
        data.LabelRow(id="x/chosen", prompt="q", completion="b", label=True),
        data.LabelRow(id="x/rejected", prompt="q", completion="a", label=False),
    )
    assert convert(values, *signature(values), "unpaired", "x") == data.unpair(pair(values))  # type: ignore[misc]
