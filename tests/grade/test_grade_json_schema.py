from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import pytest

from posttrain.core import ConfigError, Grade, GradeError, MissingExtraError, Task
from posttrain.grade import JsonSchema, NoJson, json_in, prove, trajectory_from_text

pytest.importorskip("jsonschema", reason="jsonschema is not installed")
GradeText = Callable[..., Grade]


@pytest.mark.parametrize("grader", [JsonSchema(), JsonSchema(anywhere=False), JsonSchema(parses_score=0.25)])
def test_it_proves_itself(grader: JsonSchema) -> None:
    assert prove(grader).problems == ()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 2]", [1, 2]),
        ('"a"', "a"),
        ("```json\n{}\n```", {}),
        ("one\n```\n[1]\n```\ntwo\n```\nnot json\n```", [1]),
        ('so {"a": {"b": [1]}} and then', {"a": {"b": [1]}}),
        ("first [1] then [2]", [2]),
    ],
)
def test_json_in(text: str, value: object) -> None:
    assert json_in(text) == value


@pytest.mark.parametrize("text", ["", "none", "{'a': 1}", "[1,]", "NaN", "[Infinity]", "[" * 100_000, '{"a":1,"a":2}'])
def test_no_json(text: str) -> None:
    with pytest.raises(NoJson):
        json_in(text)


def test_what_is_wrong_is_said(grade_text: GradeText) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "array", "items": {"type": "integer"}}}}
    grade = grade_text(JsonSchema(schema), '{"n": [1, "2"]}')
    assert (grade.score, grade.parts) == (0.0, {"parses": 1.0, "valid": 0.0})
    assert grade.rationale.startswith("$.n[1]: '2' is not of type 'integer'")
    assert grade_text(JsonSchema(schema), "nothing").parts == {"parses": 0.0, "valid": 0.0}


def test_a_wrong_schema_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no JSON schema"):
        JsonSchema({"type": "thing"})
    task = Task(id="t", prompt="?", facts={"schema": {"type": "thing"}})
    with pytest.raises(GradeError, match="no JSON schema"):
        asyncio.run(JsonSchema().grade(trajectory_from_text(task, "{}")))
    with pytest.raises(GradeError, match="must be a JSON schema"):
        asyncio.run(JsonSchema().grade(trajectory_from_text(Task(id="t", prompt="?"), "{}")))


def test_a_schema_fetches_nothing(grade_text: GradeText) -> None:
    with pytest.raises(Exception, match=r"example\.invalid"):
        grade_text(JsonSchema({"$ref": "http://example.invalid/schema.json"}), "{}")


def test_without_jsonschema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"posttrain\[schema\]"):
        JsonSchema()
