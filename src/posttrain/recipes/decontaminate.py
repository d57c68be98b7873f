"""Training rows without those that give an evaluation task away, and what was found, for the lineage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from posttrain import data as rows
from posttrain.core import DataError
from posttrain.data.texts import Item, identified
from posttrain.recipes.workbench import Workbench
from posttrain.registry import Artifact

T = TypeVar("T", bound=Item)


def without_evaluation(
    bench: Workbench, items: Sequence[T], evaluation: Sequence[Path], source: Artifact, *, columns: str | None = None
) -> list[T]:
    """Drop the rows that are in evaluation files (equal texts, or more than half of a task's words in 8-grams).

    Says how many, keeps the matches in `contamination.json` of the run, and writes the overlap of what is left into
    the data set's lineage, where the promotion gate looks for it by the suite's name (the file's, without endings).

    Args:
        items: tasks, rows or (id, text) pairs to train on.
        evaluation: files of tasks, in any format that is recognised; none: nothing is checked.
        source: the data set that the items come from.
        columns: how to read the evaluation files.

    Raises:
        DataError: every row is in an evaluation file.
    """
    if not evaluation:
        return list(items)
    sets = {path.name.split(".")[0]: list(rows.load(path, columns=columns).rows) for path in evaluation}
    found = rows.check_contamination(items, sets)
    (bench.run.path / "contamination.json").write_bytes(found.to_json())
    bench.say(f"contamination: {found.summary()}; dropped")
    gone = set(found.dropped)
    kept = [item for item, (name, _) in zip(items, identified(items), strict=True) if name not in gone]
    if not kept:
        raise DataError(f"all {len(items)} training rows are in the evaluation files {', '.join(sets)}")
    left = rows.check_contamination(kept, sets)
    meta = {"contamination": {name: share.share for name, share in left.sets.items()}, "dropped": len(gone)}
    bench.registry.add_artifact(Path(source.path), kind="dataset", name=source.name, meta=meta, storage="reference")
    return kept
