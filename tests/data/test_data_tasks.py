from __future__ import annotations

import pytest

from posttrain import data
from posttrain.core import DataError, Task, ToolSpec, assistant, system, user


def test_final_answer() -> None:
    assert data.final_answer("3 * 4 = 12\n#### 12") == "12"
    assert data.final_answer("#### $1,234,567.50 \n") == "$1234567.50"
    assert data.final_answer("#### 1, 2") == "1, 2"
    assert data.final_answer("a #### 3") is None
    assert data.final_answer("12") is None
    assert data.final_answer("#### ") is None


def test_gsm8k_solution_goes_to_the_facts() -> None:
    row = data.PromptRow(id="r", prompt="3 * 4?", answer="3 * 4 = 12\n#### 12", facts={"level": 5})
    expected = Task(
        id="r", prompt="3 * 4?", answer="12", facts={"level": 5, "solution": "3 * 4 = 12\n#### 12"}, tags=("level:5",)
    )
    assert data.to_task(row, tags=["level"]) == expected
    assert data.to_task(row, chat=True).prompt == (user("3 * 4?"),)
    with pytest.raises(DataError, match="r: no fact 'subject'; there are level, solution"):
        data.to_task(row, tags=["subject"])


def test_other_rows() -> None:
    tools = (ToolSpec(name="f"),)
    chat = data.CompletionRow(id="r", prompt=(user("q"),), completion=(assistant("a"),), tools=tools)
    assert data.to_task(chat) == Task(id="r", prompt=(user("q"),), answer="a", tools=tools)
    assert data.to_task(data.CompletionRow(id="r", prompt="q", completion="so\n#### 7")).answer == "7"
    pair = data.PreferenceRow(id="r", prompt="q", chosen="a", rejected="b")
    assert data.to_task(pair) == Task(id="r", prompt="q")
    assert data.to_task(data.StepsRow(id="r", prompt="q", completions=("a",), labels=(True,))).answer is None
    with pytest.raises(DataError, match="plain text has no prompt"):
        data.to_task(data.TextRow(id="r", text="t"))


def test_tasks_on_one_passage_share_a_cluster() -> None:
    def task(passage: str, question: str) -> Task:
        return data.to_task(data.PromptRow(id=question, prompt=question, facts={"passage": passage, "book": "b"}))

    assert task("p", "1").cluster == task("p", "2").cluster is not None
    assert task("p", "1").cluster != task("other", "1").cluster
    assert task("", "1").cluster is None
    row = data.PromptRow(id="r", prompt="q", facts={"passage": "p", "book": "b"})
    assert data.to_task(row, cluster="book").cluster not in (None, data.to_task(row).cluster)


def test_as_chat() -> None:
    pair = data.PreferenceRow(id="r", prompt="q", chosen="a", rejected="b", margin=1.0)
    assert data.as_chat(pair, system_prompt="s") == data.PreferenceRow(
        id="r", prompt=(system("s"), user("q")), chosen=(assistant("a"),), rejected=(assistant("b"),), margin=1.0
    )
    chat = data.as_chat(pair)
    assert data.as_chat(chat) == chat
    prompted = data.PromptRow(id="r", prompt=(system("own"), user("q")))
    assert data.as_chat(prompted, system_prompt="s") == prompted
