"""Gold queries of a public text-to-SQL set on its own databases."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
from pathlib import Path

import pytest

from posttrain.core import Task
from posttrain.grade import SqlResult, grade_all, trajectory_from_text

_FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "text_to_sql" / "defog"


@pytest.mark.slow
def test_gold_queries_match_themselves_and_rarely_their_neighbours(tmp_path: Path) -> None:
    if not _FOLDER.exists():
        pytest.skip("no data folder text_to_sql/defog beside the repository")
    databases = {}
    for packed in sorted(_FOLDER.glob("*.sqlite.gz")):
        databases[packed.name.partition(".")[0]] = path = tmp_path / packed.stem
        path.write_bytes(gzip.decompress(packed.read_bytes()))
    lines = (_FOLDER / "questions_gen_sqlite.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["db_name"] in databases]
    tasks = []
    for place, row in enumerate(rows):
        first, *others = [query.strip() for query in row["query"].split(";") if query.strip()]
        facts = {"database": row["db_name"], "answers": others}
        tasks.append(Task(id=str(place), prompt=row["question"], answer=first, facts=facts))
    grader = SqlResult(databases)
    own = [
        trajectory_from_text(task, f"```sql\n{query};\n```")
        for task in tasks
        for query in [task.answer or "", *task.facts["answers"]]
    ]
    grades = asyncio.run(grade_all(grader, own, deadline_s=120))
    assert len(tasks) >= 80
    assert {
        trajectory.text: grade.error or grade.rationale
        for trajectory, grade in zip(own, grades, strict=True)
        if grade.score != 1
    } == {}
    pairs = [
        (one, other) for one, other in itertools.pairwise(tasks) if one.facts["database"] == other.facts["database"]
    ]
    swapped = [trajectory_from_text(one, other.answer or "") for one, other in pairs]
    grades = asyncio.run(grade_all(grader, swapped, deadline_s=120))
    assert all(grade.score is not None for grade in grades)
    assert all(grade.parts["executes"] == 1 for grade in grades)
    assert sum(grade.score or 0 for grade in grades) <= 0.02 * len(grades)
