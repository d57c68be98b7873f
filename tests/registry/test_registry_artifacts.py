"""Artifacts: identity by content, names, parents, damage, lineage."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.core import EvalReport, Interval, ModelCard, RegistryError
from posttrain.registry import Registry, RunFolder, folder_digest


def _folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_the_id_is_the_digest_of_sorted_names_and_hashes(tmp_path: Path, registry: Registry) -> None:
    folder = _folder(tmp_path / "m", {"b/w.bin": b"weights", "a.json": b"{}"})
    pairs = [["a.json", hashlib.sha256(b"{}").hexdigest()], ["b/w.bin", hashlib.sha256(b"weights").hexdigest()]]
    by_hand = hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()
    assert registry.add_artifact(folder, kind="model", name="m").id == by_hand == folder_digest(folder)
    renamed = _folder(tmp_path / "m2", {"b/v.bin": b"weights", "a.json": b"{}"})
    assert folder_digest(renamed) != by_hand


def test_adding_twice_is_adding_once_and_gathers_what_is_known(tmp_path: Path, registry: Registry) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(b'{"x": 1}\n')
    base = registry.add_artifact(b"source", kind="dataset", name="source")
    first = registry.add_artifact(data, kind="dataset", name="rows", meta={"a": 1})
    again = registry.add_artifact(data, kind="dataset", name="rows/v2", parents=["source"], meta={"b": 2})
    as_bytes = registry.add_artifact(data.read_bytes(), kind="dataset", name="rows")
    assert first.id == again.id == as_bytes.id
    assert len(registry.artifacts("dataset")) == 2
    assert as_bytes.meta == {"a": 1, "b": 2}
    assert as_bytes.parents == (base.id,)
    assert as_bytes.name == "rows"
    assert registry.artifact("rows/v2").id == first.id
    assert Path(as_bytes.path).read_bytes() == data.read_bytes()


def test_a_name_means_the_newest_that_bears_it(registry: Registry) -> None:
    old = registry.add_artifact(b"one", kind="dataset", name="rows")
    new = registry.add_artifact(b"two", kind="dataset", name="rows")
    assert registry.artifact("rows").id == new.id
    assert registry.artifact(old.id[:12]).id == old.id
    registry.add_artifact(b"one", kind="dataset", name="rows")
    assert registry.artifact("rows").id == old.id


def test_unknown_and_ambiguous_references_name_near_ones(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="none yet"):
        registry.artifact("anything")
    registry.add_artifact(b"one", kind="dataset", name="shop-sql/train")
    with pytest.raises(RegistryError, match="Near ones: shop-sql/train"):
        registry.artifact("shop-sql/trian")
    with pytest.raises(RegistryError, match="no run"):
        registry.add_artifact(b"x", kind="dataset", name="x", run="nope")
    with pytest.raises(RegistryError, match="no artifact"):
        registry.add_artifact(b"x", kind="dataset", name="x", parents=["nope"])
    with pytest.raises(RegistryError, match="known as dataset"):
        registry.add_artifact(b"one", kind="model", name="m")


@pytest.mark.parametrize("kind", ["missing", "empty", "fifo", "linked folder"])
def test_what_is_no_artifact_is_refused(tmp_path: Path, registry: Registry, kind: str) -> None:
    path = tmp_path / "thing"
    if kind != "missing":
        path.mkdir()
    if kind == "fifo":
        os.mkfifo(path / "pipe")
    if kind == "linked folder":
        (path / "up").symlink_to(tmp_path)
    with pytest.raises(RegistryError, match="thing"):
        registry.add_artifact(path, kind="model", name="m")
    assert registry.artifacts() == []


@pytest.mark.parametrize("storage", ["copy", "link", "reference"])
def test_storage_and_verification(tmp_path: Path, registry: Registry, storage: str) -> None:
    folder = _folder(tmp_path / "m", {"w.bin": b"weights", "c.json": b"{}", "sub/t.txt": b"t"})
    artifact = registry.add_artifact(folder, kind="model", name="m", storage=storage)  # type: ignore[arg-type]
    place = Path(artifact.path)
    assert (place == folder) is (storage == "reference")
    assert ((place / "w.bin").stat().st_ino == (folder / "w.bin").stat().st_ino) is (storage != "copy")
    assert registry.verify("m").id == artifact.id
    (place / "w.bin").unlink()
    (place / "w.bin").write_bytes(b"other")
    (place / "c.json").unlink()
    (place / "new.txt").write_bytes(b"")
    with pytest.raises(RegistryError, match=r"c.json is gone; w.bin has changed; new.txt is new"):
        registry.verify("m")
    if storage == "copy":
        assert folder_digest(folder) == artifact.id


def test_a_reference_becomes_a_copy_when_it_is_added_as_one(tmp_path: Path, registry: Registry) -> None:
    folder = _folder(tmp_path / "m", {"w.bin": b"weights"})
    registry.add_artifact(folder, kind="model", name="m", storage="reference")
    assert Path(registry.add_artifact(folder, kind="model", name="m").path) != folder
    assert registry.add_artifact(folder, kind="model", name="m", storage="reference").storage == "copy"


def test_linked_files_are_followed(tmp_path: Path, registry: Registry) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"weights")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "w.bin").symlink_to(blob)
    stored = Path(registry.add_artifact(snapshot, kind="model", name="m").path) / "w.bin"
    assert stored.read_bytes() == b"weights"
    assert not stored.is_symlink()


def test_files_that_change_while_copied_are_not_registered(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.registry import content

    folder = _folder(tmp_path / "m", {"w.bin": b"weights"})
    monkeypatch.setattr(content.shutil, "copyfile", lambda old, new: Path(new).write_bytes(b"torn"))
    with pytest.raises(RegistryError, match="changed while"):
        registry.add_artifact(folder, kind="model", name="m")
    assert registry.artifacts() == []
    assert list((registry.path.parent / "artifacts").rglob("w.bin")) == []


def test_the_whole_folder_may_be_moved(tmp_path: Path) -> None:
    with Registry(tmp_path / "old" / "registry.db") as registry:
        artifact = registry.add_artifact(b"content", kind="dataset", name="rows.jsonl")
    (tmp_path / "old").rename(tmp_path / "new")
    with Registry(tmp_path / "new" / "registry.db") as registry:
        assert registry.verify("rows.jsonl").id == artifact.id


def test_runs_and_lineage(tmp_path: Path, registry: Registry, make_report: Callable[..., EvalReport]) -> None:
    run = RunFolder.create(tmp_path / "runs", "grpo", {"lr": 0.1})
    registry.add_run(run)
    source = registry.add_artifact(b"raw", kind="dataset", name="raw")
    data = registry.add_artifact(b"clean", kind="dataset", name="clean", parents=[source.id])
    base = registry.add_artifact(b"base", kind="model", name="base", parents=[source.id])
    tuned = registry.add_artifact(b"tuned", kind="model", name="tuned", parents=[base.id, "clean"], run=run.id)
    registry.add_artifact(b"tuned", kind="model", name="tuned", parents=[tuned.id])  # its own parent: no edge
    run.finish()
    registry.add_run(run)
    assert registry.run(run.id[-4:]).status == "finished"
    assert [state.id for state in registry.runs()] == [run.id]

    lineage = registry.lineage("tuned")
    assert lineage.root().id == tuned.id
    assert {(edge.child, edge.parent) for edge in lineage.edges} == {
        (tuned.id, run.id),
        (tuned.id, base.id),
        (tuned.id, data.id),
        (base.id, source.id),
        (data.id, source.id),
    }
    lines = lineage.tree().splitlines()
    assert lines[0] == f"model tuned  {tuned.id[:12]}"
    assert lines[1].startswith(f"├─ run {run.id}  recipe grpo, settings {run.state.fingerprint}, posttrain ")
    assert lines[2:] == [
        f"├─ model base  {base.id[:12]}",
        f"│  └─ dataset raw  {source.id[:12]}",
        f"└─ dataset clean  {data.id[:12]}",
        f"   └─ dataset raw  {source.id[:12]}",
    ]
    card = registry.card("tuned")
    assert (card.recipe, card.run, card.parents) == ("grpo", run.id, (base.id, data.id))
    assert card.metrics == {}
    registry.add_report(make_report(tuned.id, right=10), "tuned")
    assert registry.card("tuned").metrics["accuracy"].value == 0.25
    with pytest.raises(RegistryError, match="not a model"):
        registry.card("clean")


def test_a_circle_of_parents_does_not_hang(registry: Registry) -> None:
    registry.add_artifact(b"one", kind="model", name="one")
    registry.add_artifact(b"two", kind="model", name="two", parents=["one"])
    registry.add_artifact(b"one", kind="model", name="one", parents=["two"])
    assert len(registry.lineage("one").nodes) == 2
    assert "(see above)" in registry.lineage("one").tree()


def test_reports_come_back_newest_first(
    registry: Registry, make_model: Callable[..., ModelCard], make_report: Callable[..., EvalReport]
) -> None:
    card = make_model("m", right=10)
    registry.add_report(make_report(card.id, right=20), card.id)
    registry.add_report(make_report(card.id, right=30, suite="other"), card.id)
    values = [report.metrics["accuracy"].value for report in registry.reports("m")]
    assert values == [0.75, 0.5, 0.25]
    assert [report.suite for report in registry.reports("m", "sums")] == ["sums", "sums"]
    nan = Interval(value=float("nan"), low=0.0, high=1.0, n=0, method="wilson")
    with pytest.raises(RegistryError, match="'accuracy' is not a finite number"):
        registry.add_report(make_report(card.id).replace(metrics={"accuracy": nan}), card.id)


def test_a_file_that_is_no_registry_or_a_newer_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("hello, this is a text file and not a database at all" * 10)
    with pytest.raises(RegistryError, match="cannot be used"):
        Registry(tmp_path / "text.db")
    Registry(tmp_path / "new.db").close()
    with sqlite3.connect(tmp_path / "new.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(RegistryError, match="version 99"):
        Registry(tmp_path / "new.db")
