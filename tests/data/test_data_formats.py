from __future__ import annotations

from typing import Any

import pytest

from posttrain import data
from posttrain.core import DataError, UsageError

USER = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}

# The examples of TRL's table of dataset types and formats, then the other shapes.
EXAMPLES: list[tuple[dict[str, Any], str, bool, bool]] = [
    ({"text": "The sky is blue."}, "language_modeling", False, False),
    ({"messages": [USER, BLUE]}, "language_modeling", True, False),
    ({"prompt": "The sky is"}, "prompt_only", False, False),
    ({"prompt": [USER]}, "prompt_only", True, False),
    ({"prompt": "The sky is", "completion": " blue."}, "prompt_completion", False, False),
    ({"prompt": [USER], "completion": [BLUE]}, "prompt_completion", True, False),
    ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "preference", False, False),
    ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "preference", False, True),
    ({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, "preference", True, False),
    ({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, "preference", True, True),
    ({"prompt": "The sky is", "completion": " blue.", "label": True}, "unpaired_preference", False, False),
    ({"prompt": [USER], "completion": [BLUE], "label": True}, "unpaired_preference", True, False),
    (
        {"prompt": "9.11 or 9.8?", "completions": ["a", "b"], "labels": [True, False]},
        "stepwise_supervision",
        False,
        False,
    ),
    ({"conversations": [{"from": "human", "value": "hi"}]}, "sharegpt", True, False),
    ({"conversations": [{"from": "human", "value": "hi"}], "chosen": {}, "rejected": {}}, "preference", True, False),
    ({"messages": [USER, BLUE], "label": False}, "unpaired_preference", True, False),
    ({"instruction": "a", "input": "", "output": "b"}, "alpaca", False, False),
    ({"question": "1+1", "answer": "#### 2"}, "question_answer", False, False),
    ({"query": "a", "choices": ["b", "c"], "gold": 0}, "multiple_choice", False, False),
    ({"input": "a", "output_1": "b", "output_2": "c", "label": 1}, "pairwise", False, False),
]


@pytest.mark.parametrize(("values", "name", "conversational", "implicit"), EXAMPLES)
def test_detect(values: dict[str, Any], name: str, conversational: bool, implicit: bool) -> None:
    found = data.detect(values)
    assert (found.type.value, found.conversational, found.implicit_prompt) == (name, conversational, implicit)
    assert data.detect({**values, "source": "web"}) == found
    assert data.detect({**values, "rejected_score": None}) == found


def test_null_columns_are_absent() -> None:
    assert data.detect({"prompt": "a", "completion": "b", "label": None}).type == "prompt_completion"
    assert data.detect({"text": None, "prompt": "a", "chosen": None, "rejected": None}).type == "prompt_only"


def test_kind_decides_where_several_types_fit() -> None:
    values = {"prompt": "a", "completion": "b", "label": "science"}
    assert data.detect(values).type == "unpaired_preference"
    assert data.detect(values, "completion").type == "prompt_completion"
    assert data.detect(values, "prompt").type == "unpaired_preference"


def test_unknown_format_names_columns_and_the_way_out() -> None:
    with pytest.raises(DataError, match=r"no known data format has the columns foo, bar; name them with columns"):
        data.detect({"foo": 1, "bar": 2})
    with pytest.raises(DataError, match="are question_answer: they become prompt, completion, not preference"):
        data.detect({"question": "a", "answer": "b"}, "preference")


def test_column_map() -> None:
    parsed = data.ColumnMap.parse("prompt=question, completion=answer")
    assert parsed == data.ColumnMap.parse({"prompt": "question", "completion": "answer"})
    assert data.ColumnMap.parse(parsed) is parsed
    row = {"question": "q", "answer": "a", "prompt": "not this", "source": "web"}
    assert parsed.rename(row) == {"prompt": "q", "completion": "a", "source": "web"}
    assert data.ColumnMap.parse(None).rename(row) == row
    for wrong in ("prompt", "prompt=", "=question", "prompt=a,prompt=b"):
        with pytest.raises(UsageError):
            data.ColumnMap.parse(wrong)
    with pytest.raises(UsageError, match="'promt' is not a canonical name; those are id, text"):
        data.ColumnMap.parse({"promt": "question"})
    with pytest.raises(UsageError, match="one column stands for two names"):
        data.ColumnMap.parse({"prompt": "question", "completion": "question"})
