"""Small models, reports and comparisons for the registry's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from posttrain.core import (
    Comparison,
    EvalReport,
    EvalSample,
    Grade,
    Interval,
    ModelCard,
    Sampling,
    StopReason,
    Task,
)
from posttrain.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "runs" / "registry.db") as opened:
        yield opened
        opened.check()


@pytest.fixture
def make_report() -> Callable[..., EvalReport]:
    def make(model: str, *, right: int = 30, n: int = 40, failed: int = 0, suite: str = "sums") -> EvalReport:
        samples = tuple(
            EvalSample(
                task=Task(id=f"t{i}", prompt=f"{i}+1=", answer=str(i + 1)),
                index=0,
                text=str(i + 1),
                grade=Grade(score=None, grader="exact", error="boom")
                if i < failed
                else Grade(score=1.0 if i < right else 0.0, grader="exact"),
                stop_reason=StopReason.EOS,
                num_tokens=2,
            )
            for i in range(n)
        )
        accuracy = Interval(value=right / n, low=0.0, high=1.0, n=n, method="wilson")
        return EvalReport(
            suite=suite,
            suite_hash="h",
            model=model,
            sampling=Sampling(temperature=0.0),
            metrics={"accuracy": accuracy},
            samples=samples,
            num_failed=failed,
        )

    return make


@pytest.fixture
def make_model(registry: Registry, tmp_path: Path, make_report: Callable[..., EvalReport]) -> Callable[..., ModelCard]:
    """A registered model folder with a report, as a card."""

    def make(name: str, *, report: bool = True, parents: tuple[str, ...] = (), **of_report: int) -> ModelCard:
        folder = tmp_path / "weights" / name.replace("/", "_")
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(name.encode() * 10)
        (folder / "config.json").write_text("{}")
        artifact = registry.add_artifact(folder, kind="model", name=name, parents=parents)
        if report:
            registry.add_report(make_report(artifact.id, **of_report), artifact.id)
        return registry.card(artifact.id)

    return make


@pytest.fixture
def compare() -> Callable[..., Comparison]:
    def make(
        candidate: str,
        champion: str,
        *,
        low: float = 0.01,
        n: int = 40,
        confidence: float = 0.95,
        p: float = 0.01,
        suite: str = "sums",
    ) -> Comparison:
        difference = Interval(value=low + 0.1, low=low, high=low + 0.2, n=n, method="bootstrap", confidence=confidence)
        return Comparison(
            suite=suite,
            candidate=candidate,
            champion=champion,
            difference=difference,
            wins=9,
            losses=2,
            ties=n - 11,
            p_value=p,
            better=low > 0,
        )

    return make
