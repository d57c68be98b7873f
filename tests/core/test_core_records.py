"""Records are frozen, strict and hash the same everywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from posttrain.core import (
    Config,
    ConfigError,
    DataError,
    Grade,
    JsonlTracker,
    Mean,
    MissingExtraError,
    PosttrainError,
    Sampling,
    Task,
    UsageError,
    derive_seed,
    doc,
    errors,
    generator,
    read_jsonl,
    read_metrics,
    user,
)


def test_a_record_survives_the_disk_and_cannot_be_changed() -> None:
    task = Task(id="a", prompt=(user("hé?"),), answer="42", facts={"k": [1, 2.5, None]})
    assert Task.from_json(task.to_json()) == task
    assert Task.from_dict(task.to_dict()) == task
    with pytest.raises(AttributeError):
        task.id = "b"  # type: ignore[misc]


def test_unknown_fields_and_other_versions_are_errors_that_name_the_place() -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:3.*colour"):
        Task.from_json(b'{"record":"task/1","id":"a","prompt":"x","colour":1}', "f.jsonl:3")
    with pytest.raises(DataError, match="task/2"):
        Task.from_json(b'{"record":"task/2","id":"a","prompt":"x"}')


def test_content_hash_depends_on_content_alone() -> None:
    one = Task(id="a", prompt="x", facts={"a": 1, "b": 2})
    two = Task(id="a", prompt="x", facts={"b": 2, "a": 1})
    assert one.content_hash() == two.content_hash()
    assert one.content_hash() != one.replace(prompt="y").content_hash()


def test_read_jsonl_names_the_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(Task(id="a", prompt="x").to_json() + b"\n{broken\n")
    with pytest.raises(DataError, match=r"tasks\.jsonl:2"):
        read_jsonl(path, Task)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 1.5),
        ("n", 0),
        ("stop", ("",)),
    ],
)
def test_sampling_refuses_what_cannot_be(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value})  # type: ignore[arg-type]


def test_a_grade_has_either_a_score_or_an_error() -> None:
    assert Grade(score=0.0, grader="g").score == 0.0
    with pytest.raises(ValueError, match="either"):
        Grade(score=None, grader="g")
    with pytest.raises(ValueError, match="either"):
        Grade(score=1.0, grader="g", error="crashed")


class _Inner(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lr: Annotated[float, doc("peak", gt=0)] = 0.1


class _Outer(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    inner: Annotated[_Inner, doc("nested")] = msgspec.field(default_factory=_Inner)
    name: Annotated[str | None, doc("a name")] = None


def test_config_goes_to_toml_and_back(tmp_path: Path) -> None:
    config = _Outer(inner=_Inner(lr=0.25), name="x")
    path = tmp_path / "c.toml"
    path.write_text(config.to_toml())
    assert _Outer.from_toml(path) == config
    path.write_text(_Outer().to_toml())
    assert _Outer.from_toml(path) == _Outer()


def test_config_errors_say_what_and_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"colour.*Known keys: inner, name"):
        _Outer.from_dict({"colour": 1})
    with pytest.raises(ConfigError, match=r"\$\.inner\.lr"):
        _Outer.from_dict({"inner": {"lr": -1.0}})
    path = tmp_path / "broken.toml"
    path.write_text("a = [")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        _Outer.from_toml(path)
    with pytest.raises(ConfigError, match="no such"):
        _Outer.from_toml(tmp_path / "absent.toml")


def test_fingerprint_is_of_values_not_of_order() -> None:
    assert _Outer.from_dict({"name": "x", "inner": {}}).fingerprint() == _Outer(name="x").fingerprint()
    assert _Outer(name="x").fingerprint() != _Outer(name="y").fingerprint()


def test_seeds_are_the_same_on_every_machine_and_differ_by_name() -> None:
    # SHA-256 of "7\x1fstr:rollout\x1fint:3", first eight bytes, shifted right by one.
    assert derive_seed(7, "rollout", 3) == 1077113614855762169
    assert derive_seed(7, "rollout", 3) != derive_seed(7, "rollout", "3")
    assert derive_seed(7, "a", "b") != derive_seed(7, "ab")
    assert generator(1, "x").random() == generator(1, "x").random()


def test_metrics_come_back_from_disk_without_the_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log({"loss": 0.5, "kl": math.nan}, step=1)
    tracker.close()
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    rows = read_metrics(path)
    assert len(rows) == 1
    assert rows[0]["loss"] == 0.5
    assert math.isnan(rows[0]["kl"])
    path.write_bytes(b'{"step": 1\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        read_metrics(path)


def test_means_are_weighted() -> None:
    mean = Mean()
    mean.add({"a": 1.0}, weight=3)
    mean.add({"a": 5.0, "b": 2.0}, weight=1)
    assert mean.result() == {"a": 2.0, "b": 2.0}


def test_every_error_is_a_posttrain_error_and_stands_in_the_tree() -> None:
    found = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)]
    assert len(found) > 10
    for kind in found:
        assert issubclass(kind, PosttrainError)
        assert kind.__name__ in (errors.__doc__ or ""), f"{kind.__name__} is missing from the drawn tree"
    assert "pip install 'posttrain[serve]'" in str(MissingExtraError("starlette", "serve", "serving"))
    assert issubclass(MissingExtraError, UsageError)
