"""The grader of structured answers: JSON that a schema accepts."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from posttrain.core import ConfigError, Grade, GradeCase, GradeError, MissingExtraError, Task, Trajectory
from posttrain.grade.answer import answer_text, binary, right, wrong

_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)
_MAX_CHARACTERS = 200_000
_MAX_STARTS = 50  # brackets at which JSON is looked for in running text


class NoJson(ValueError):
    """A text holds no JSON."""


def json_in(text: str, *, anywhere: bool = True) -> Any:
    """The JSON value in an answer.

    The whole text, or else what stands in the last fenced block that is JSON, or else the last object or list that
    stands in the text. `NaN` and `Infinity` are no JSON; of a name that comes twice in an object, none is right.

    Args:
        text: the answer.
        anywhere: whether fenced blocks and running text are searched.

    Raises:
        NoJson: there is none; says where the best candidate goes wrong.
    """
    text = text.strip()[:_MAX_CHARACTERS]
    try:
        return _loads(text)
    except ValueError as error:
        problem = error
    if anywhere:
        for _, body in reversed(_FENCE.findall(text)):
            try:
                return _loads(body.strip())
            except ValueError as error:
                problem = error
        for value in reversed(_values_in(text)):
            return value
    raise NoJson(str(problem)) from problem


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _values_in(text: str) -> list[Any]:
    """Objects and lists in running text, outermost only, left to right."""
    decoder = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique)
    found: list[Any] = []
    position = tries = 0
    while (match := re.compile(r"[\[{]").search(text, position)) and tries < _MAX_STARTS:
        tries += 1
        try:
            value, position = decoder.raw_decode(text, match.start())
            found.append(value)
        except (ValueError, RecursionError):
            position = match.end()
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice in one object")
    return found


class JsonSchema:
    """1 where the answer is JSON that the schema accepts, else 0.

    Parts: `parses`, 1 where the answer holds JSON; `valid`, 1 where the schema accepts it.

    Args:
        schema: a JSON schema; None takes `task.facts["schema"]`.
        anywhere: whether JSON may stand in a fenced block or among other text, or must be the whole answer.
        parses_score: score of an answer that is JSON and not what the schema wants.
        name: the grader's name.

    Raises:
        MissingExtraError: jsonschema is not installed.
        ConfigError: the schema is none.
    """

    def __init__(
        self,
        schema: Mapping[str, Any] | None = None,
        *,
        anywhere: bool = True,
        parses_score: float = 0.0,
        name: str = "json_schema",
    ) -> None:
        if importlib.util.find_spec("jsonschema") is None:
            raise MissingExtraError("jsonschema", "schema", "grade.JsonSchema")
        self._library: Any = importlib.import_module("jsonschema")
        self.name = name
        self._anywhere = anywhere
        self._parses_score = parses_score
        self._schema = schema
        if schema is not None:
            try:
                self._checker(schema)
            except GradeError as error:
                raise ConfigError(f"grader {name!r}: {error}") from error

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Parse and validate; raises GradeError where the task has no schema or a wrong one."""
        started_s = time.perf_counter()
        schema = self._schema if self._schema is not None else trajectory.task.facts.get("schema")
        if not isinstance(schema, Mapping):
            raise GradeError(f"task {trajectory.task.id!r}: facts['schema'] must be a JSON schema, not {schema!r}")
        checker = self._checker(schema)
        try:
            value = json_in(answer_text(trajectory), anywhere=self._anywhere)
        except NoJson as error:
            return binary(self.name, False, started_s, f"no JSON: {error}"[:300], parses=0.0, valid=0.0)
        worst = self._library.exceptions.best_match(checker.iter_errors(value))
        if worst is None:
            return binary(self.name, True, started_s, parses=1.0, valid=1.0)
        grade = binary(self.name, False, started_s, f"{worst.json_path}: {worst.message}"[:300], parses=1.0, valid=0.0)
        return grade.replace(score=self._parses_score)

    def _checker(self, schema: Mapping[str, Any]) -> Any:
        """A validator of the draft that the schema names; references lead nowhere but into the schema itself."""
        kind = self._library.validators.validator_for(schema, default=self._library.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except self._library.exceptions.SchemaError as error:
            raise GradeError(f"no JSON schema: {error.json_path}: {error.message}") from error
        registry: Any = importlib.import_module("referencing").Registry()
        return kind(schema, registry=registry)

    def cases(self) -> Sequence[GradeCase]:
        """Answers that the schema accepts and near misses; with a schema of one's own, only that text is none."""
        if self._schema is not None:
            task = Task(id="own", prompt="?")
            return (wrong(task, "no JSON at all"), wrong(task, "{'a': 1}", "quotes of Python"))
        schema = {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
        task = Task(id="person", prompt="Who?", facts={"schema": schema})
        good = '{"name": "Ann", "age": 7}'
        inside = [right(task, f"Here:\n```json\n{good}\n```\nThat is it."), right(task, f"It is {good}, I think.")]
        outside = [wrong(task, case.text, "other text beside it") for case in inside]
        most = self._parses_score
        bad = [
            ('{"name": "Ann", "age": -7}', "too small"),
            ('{"name": "Ann", "age": "7"}', "a text for a number"),
            ('{"name": "Ann"}', "a field is missing"),
            ('{"name": "Ann", "age": 7, "x": 1}', "a field too many"),
            (f"[{good}]", "a list of it"),
        ]
        return (
            right(task, good),
            *(inside if self._anywhere else outside),
            *(wrong(task, text, why).replace(low=most, high=most) for text, why in bad),
            wrong(task, "{'name': 'Ann', 'age': 7}", "quotes of Python"),
            wrong(task, '{"name": "Ann", "age": NaN}', "no number of JSON"),
            wrong(task, '{"name": "Ann", "name": "Bob", "age": 7}', "a name twice"),
            wrong(task, good[:-1], "cut short"),
            wrong(task, ""),
        )
