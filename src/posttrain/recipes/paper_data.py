"""Data of the recipes that follow a paper: files of tasks with their graders, and rows that give no evaluation away."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from posttrain import data as rows
from posttrain.core import DataError, Grade, Grader, Task, Trajectory, UsageError, read_jsonl
from posttrain.data import CompletionRow, PreferenceRow
from posttrain.evaluate import suite_from_file
from posttrain.recipes.grading import grader_from
from posttrain.recipes.workbench import Workbench
from posttrain.registry.durable import write_atomic

R = TypeVar("R", Task, CompletionRow, PreferenceRow)

Splits = Mapping[str, Sequence[Task]]
"""Evaluation tasks by split: `dev`, which may guide a run, and `unseen`, which is asked once at its end."""


class Source(NamedTuple):
    """A file of tasks and who grades the answers to them."""

    path: Path
    grader: str  # the word that names it, as `grading.grader_from` reads it
    label: str  # its tasks' tag


def sources_of(texts: Sequence[str], grader: str) -> list[Source]:
    """Files as the command line gives them: `PATH`, or `PATH=GRADER` where it has another grader than the others.

    Raises:
        UsageError: no such file, or two files that cannot be told apart.
    """
    found: list[Source] = []
    for text in texts:
        name, given, word = text.rpartition("=")
        path = Path(name if given else text).expanduser()
        if not path.exists():
            raise UsageError(f"{path}: no such file; tasks are given as PATH or PATH=GRADER")
        stem = path.name.split(".")[0]
        taken = {source.label for source in found}
        label = stem if stem not in taken else f"{path.resolve().parent.name}-{stem}"
        if label in taken:
            raise UsageError(f"{path}: a second file {label}; their tasks would bear the same ids")
        found.append(Source(path, word if given else grader, label))
    return found


def load_tasks(sources: Sequence[Source], *, chat: bool = False) -> list[Task]:
    """The tasks of all files, each with its file's label as first tag and as beginning of its id."""
    found = []
    for source in sources:
        grader = grader_from(source.grader)
        for task in suite_from_file(source.path, grader=grader, chat=chat).tasks:
            found.append(task.replace(id=f"{source.label}/{task.id}", tags=(source.label, *task.tags)))
    return found


class ByFile:
    """Grades each task by the grader of the file that it comes from: mathematics and instructions in one run.

    Args:
        sources: files of all tasks that will be graded.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        words = {source.grader: grader_from(source.grader) for source in sources}
        self.graders: tuple[Grader, ...] = tuple(words.values())
        self._of = {source.label: words[source.grader] for source in sources}
        self.name = "+".join(sorted({grader.name for grader in self.graders}))

    @property
    def max_concurrency(self) -> int | None:
        """As many grades under way as its narrowest grader allows."""
        limits = [getattr(grader, "max_concurrency", None) for grader in self.graders]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def deadline_s(self) -> float:
        """Seconds that the most patient of its graders asks for, or 10."""
        return max(float(getattr(grader, "deadline_s", 10.0)) for grader in self.graders)

    async def prepare(self) -> None:
        """Prepare the graders that want to be."""
        for grader in self.graders:
            if hasattr(grader, "prepare"):
                await grader.prepare()

    async def grade(self, trajectory: Trajectory) -> Grade:
        """The grade of the file's grader; its score is a part under that grader's name where there are several."""
        grade = await self._of[trajectory.task.tags[0]].grade(trajectory)
        if len(self.graders) == 1 or grade.score is None:
            return grade
        return grade.replace(grader=self.name, parts={**grade.parts, grade.grader: grade.score})


@dataclass(frozen=True)
class Data(Generic[R]):
    """Rows that hold no evaluation task, in a file of the run, registered."""

    rows: list[R]
    path: Path
    id: str  # of the artifact
    num_dropped: int


def keep_data(
    bench: Workbench,
    name: str,
    kind: type[R],
    make: Callable[[], Sequence[R]],
    splits: Splits,
    *,
    origin: Sequence[Path] = (),
    parents: Sequence[str] = (),
) -> Data[R]:
    """Rows without those that give an evaluation task away, written once and registered; read again after a resume.

    The rule is Tülu 3's (`data.check_contamination`): equal texts, or more than half of a task's words in 8-grams of
    one row. How many were dropped, and how much of each split is in what is left (nothing), is in the artifact's meta,
    where the promotion gate looks for it.

    Args:
        bench: the recipe's run.
        name: of the data in this run: `<run>/data/<name>.jsonl`.
        kind: of the rows.
        make: makes or reads the rows; not called where the file is there.
        splits: the evaluation.
        origin: files that the rows were read from; their digests are kept.
        parents: artifacts that the rows were made from.

    Raises:
        DataError: no row is left.
    """
    path = bench.run.path / "data" / f"{name}.jsonl"
    found = bench.run.path / "data" / f"{name}.contamination.json"
    if not path.exists():
        made = list(make())
        report = rows.check_contamination(made, splits)
        gone = set(report.dropped)
        kept = [row for row in made if row.id not in gone]
        bench.say(f"{name}: {len(made) - len(kept)} of {len(made)} rows dropped: they give evaluation tasks away")
        if not kept:
            raise DataError(f"{name}: none of {len(made)} rows is left to train on")
        path.parent.mkdir(exist_ok=True)
        write_atomic(found, report.to_json())
        write_atomic(path, b"".join(row.to_json() + b"\n" for row in kept))
    read = read_jsonl(path, kind)
    report = rows.ContaminationReport.from_json(found.read_bytes(), str(found))
    meta: dict[str, Any] = {
        "rows": len(read),
        "dropped": len(report.dropped),
        "dropped_for": {name: share.num_matched for name, share in report.sets.items()},
        "contamination": dict.fromkeys(report.sets, 0.0),  # a match is one of a single row, and those are dropped
        "origin": {file.name: _digest(file) for file in origin},
    }
    artifact = bench.registry.add_artifact(
        path, kind="dataset", name=f"{bench.run.id}/{name}", parents=parents, meta=meta, storage="reference"
    )
    return Data(read, path, artifact.id, len(report.dropped))


def tasks_of(
    bench: Workbench, name: str, sources: Sequence[Source], splits: Splits, *, chat: bool = False
) -> Data[Task]:
    """The tasks of training files, without those that give an evaluation task away."""
    files = [source.path for source in sources]
    return keep_data(bench, name, Task, lambda: load_tasks(sources, chat=chat), splits, origin=files)


def completions(data: Path, chat: bool) -> list[CompletionRow]:
    """Prompts and completions of a file, as turns of the chat template where that is asked for."""
    read = rows.load(data, kind="completion").rows
    return [rows.as_chat(row) for row in read] if chat else list(read)


def _digest(path: Path) -> str:
    if path.is_dir():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
