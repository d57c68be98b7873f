"""The registry: what was made, from what, how good it is, and which model is champion.

with Registry(Path("runs/registry.db")) as registry:
    model = registry.add_artifact(folder, kind="model", name="shop-sql/grpo", parents=[base.id, data.id], run=run.id)
    registry.add_report(report, model.id)
    registry.promote("shop-sql", registry.card(model.id), comparison=comparison, gate=Gate())
    registry.rollback("shop-sql", reason="complaints about joins")
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from posttrain.core import Comparison, EvalReport, ModelCard, RegistryError
from posttrain.registry.artifact import Artifact
from posttrain.registry.champions import Champions
from posttrain.registry.code_version import code_version
from posttrain.registry.content import ContentStore, Storage, changed_files, digest_of, hash_files, num_bytes
from posttrain.registry.database import Database, Row
from posttrain.registry.lineage import Lineage, LineageEdge, LineageNode
from posttrain.registry.near import unknown
from posttrain.registry.promotion import Evidence, Gate, Promotion
from posttrain.registry.rows import from_json, run_node, run_state, to_json
from posttrain.registry.run_folder import RunFolder, RunState

DEFAULT_PATH = Path("runs/registry.db")
MIN_PREFIX = 4


class Registry:
    """Artifacts, runs, reports and champions in one SQLite file; contents in the folder `artifacts` beside it.

    Safe for threads of one process and for many processes on one machine. Every change is one transaction, so a process
    killed at any instruction leaves the state before or the state after.
    """

    def __init__(self, path: Path = DEFAULT_PATH) -> None:
        self.path = Path(path)
        self._root = self.path.resolve().parent
        self._database = Database(self.path)
        self._store = ContentStore(self._root / "artifacts")
        self._champions = Champions(self._database)

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def check(self) -> None:
        """Raise RegistryError where the database is damaged."""
        self._database.check()

    # Artifacts

    def add_artifact(
        self,
        source: Path | str | bytes,
        *,
        kind: str,
        name: str,
        parents: Iterable[str] = (),
        meta: Mapping[str, Any] | None = None,
        run: str | None = None,
        storage: Storage = "copy",
    ) -> Artifact:
        """Register a file, a folder, or bytes. The same content again gives the same artifact.

        Adding known content again lets `name` mean it from now on, adds parents, and merges `meta`.

        Args:
            source: path of a file or folder; bytes are content themselves.
            kind: "model", "dataset", "report", "tokenizer" …
            name: for people; a later artifact may take the name over.
            parents: what it was made from: ids, prefixes or names of artifacts.
            meta: anything JSON. Of a dataset, `contamination` maps a suite's name to the fraction of its tasks that
                the data touches; the promotion gate reads it.
            run: id of a run that was added.
            storage: "copy" into the store, hard "link" into it, or "reference" (left in place, digest kept).

        Raises:
            RegistryError: nothing is there, a parent or run is unknown, or the content is known as another kind.
        """
        parent_ids = [self._resolve(parent) for parent in parents]
        if run is not None:
            run = self.run(run).id
        files = {"": hashlib.sha256(source).hexdigest()} if isinstance(source, bytes) else hash_files(Path(source))
        artifact_id = digest_of(files)
        known = self._database.artifact(artifact_id)
        if known is not None and known["kind"] != kind:
            raise RegistryError(f"{name}: this content is known as {known['kind']} {known['name']!r}, not as {kind}")
        place, size = self._bring(source, artifact_id, name, storage)
        with self._database.transaction():
            known = self._database.artifact(artifact_id)
            held = known is not None and self._holds(known)
            self._database.put_artifact(
                {
                    "id": artifact_id,
                    "kind": kind,
                    "name": known["name"] if known else name,
                    "path": known["path"] if known and held else self._relative(place),
                    "storage": known["storage"] if known and held else storage,
                    "num_bytes": size,
                    "files": to_json(files),
                    "meta": to_json({**(from_json(known["meta"]) if known else {}), **(meta or {})}),
                    "code": to_json(code_version()),
                    "run": known["run"] if known and known["run"] else run,
                    "created_s": time.time(),
                }
            )
            self._link(artifact_id, name, parent_ids)
        return self.artifact(artifact_id)

    def artifact(self, ref: str) -> Artifact:
        """One artifact, by id, unique prefix of at least four digits, or name (the newest that bears it).

        Raises:
            RegistryError: none or several match; names near ones.
        """
        row = self._database.artifact(self._resolve(ref))
        assert row is not None
        return self._artifact(row)

    def artifacts(self, kind: str | None = None) -> list[Artifact]:
        """All artifacts, or those of one kind, oldest first."""
        return [self._artifact(row) for row in self._database.artifacts(kind)]

    def verify(self, ref: str) -> Artifact:
        """Hash an artifact's files again.

        Raises:
            RegistryError: names each file that is gone, changed or new.
        """
        artifact = self.artifact(ref)
        changes = changed_files(artifact.files, Path(artifact.path))
        if changes:
            raise RegistryError(
                f"{artifact.kind} {artifact.name} ({artifact.short()}) is not what was registered: "
                f"{'; '.join(changes[:10])}. Restore the files or register the new content"
            )
        return artifact

    def card(self, ref: str) -> ModelCard:
        """A model's card, with the metrics of its newest report."""
        artifact = self.artifact(ref)
        if artifact.kind != "model":
            raise RegistryError(f"{artifact.name} ({artifact.short()}) is a {artifact.kind}, not a model")
        reports = self._database.reports(artifact.id, None)
        return ModelCard(
            id=artifact.id,
            name=artifact.name,
            path=artifact.path,
            parents=artifact.parents,
            run=artifact.run,
            recipe=self.run(artifact.run).recipe if artifact.run else None,
            metrics=self.report(reports[0]["artifact"]).metrics if reports else {},
            meta=artifact.meta,
            created_s=artifact.created_s,
        )

    # Runs and reports

    def add_run(self, run: RunFolder) -> RunState:
        """Register a run, or bring its status up to date."""
        state = run.state
        self._database.put_run(
            {
                "id": state.id,
                "recipe": state.recipe,
                "path": self._relative(run.path.resolve()),
                "status": state.status,
                "started_s": state.started,
                "ended_s": state.ended,
                "fingerprint": state.fingerprint,
                "config": to_json(run.config),
                "code": to_json(state.code),
            }
        )
        return state

    def run(self, ref: str) -> RunState:
        """A run by its id or a unique part of it.

        Raises:
            RegistryError: none or several match; names near ones.
        """
        row = self._database.run(ref)
        if row is None:
            rows = self._database.runs()
            fits = [row for row in rows if ref and ref in row["id"]]
            if len(fits) != 1:
                raise RegistryError(unknown("run", ref, [row["id"] for row in fits or rows], several=bool(fits)))
            row = fits[0]
        return run_state(row)

    def runs(self) -> list[RunState]:
        """All registered runs, oldest first, as they were when last added."""
        return [run_state(row) for row in self._database.runs()]

    def add_report(self, report: EvalReport, model: str) -> Artifact:
        """Keep an evaluation report about a model (id, prefix or name).

        Raises:
            RegistryError: unknown model, or a metric that is NaN or infinite.
        """
        for metric, score in report.metrics.items():
            if not all(math.isfinite(value) for value in (score.value, score.low, score.high)):
                raise RegistryError(f"report on {report.suite}: metric {metric!r} is not a finite number: {score}")
        model_id = self._resolve(model)
        name = f"{self.artifact(model_id).name}/eval/{report.suite}"
        artifact = self.add_artifact(report.to_json(), kind="report", name=name, parents=[model_id])
        self._database.put_report(
            {
                "artifact": artifact.id,
                "model": model_id,
                "suite": report.suite,
                "suite_hash": report.suite_hash,
                "created_s": time.time(),
            }
        )
        return artifact

    def report(self, ref: str) -> EvalReport:
        """A report by the id of its artifact."""
        artifact = self.artifact(ref)
        return EvalReport.from_json(Path(artifact.path).read_bytes(), artifact.path)

    def reports(self, model: str, suite: str | None = None) -> list[EvalReport]:
        """All reports about a model, newest first."""
        return [self.report(row["artifact"]) for row in self._database.reports(self._resolve(model), suite)]

    def lineage(self, ref: str) -> Lineage:
        """What made an artifact: runs, data and parents, as far up as the registry knows."""
        nodes: dict[str, LineageNode] = {}
        edges: list[LineageEdge] = []
        waiting = [self._resolve(ref)]
        while waiting:
            artifact = self.artifact(waiting.pop(0))
            if artifact.id in nodes:
                continue
            nodes[artifact.id] = LineageNode(
                id=artifact.id,
                kind=artifact.kind,
                name=artifact.name,
                meta=artifact.meta,
                code=artifact.code,
                created_s=artifact.created_s,
            )
            if artifact.run is not None:
                edges.append(LineageEdge(child=artifact.id, parent=artifact.run, relation="made by"))
                nodes.setdefault(artifact.run, run_node(self.run(artifact.run)))
            for parent in artifact.parents:
                edges.append(LineageEdge(child=artifact.id, parent=parent, relation="made from"))
                waiting.append(parent)
        return Lineage(nodes=tuple(nodes.values()), edges=tuple(edges))

    # Champions

    def champion(self, project: str) -> ModelCard | None:
        """The model that a project serves now; None before the first promotion."""
        return self._champions.champion(project)

    def projects(self) -> list[str]:
        """Every project with a history."""
        return self._database.projects()

    def history(self, project: str) -> list[Promotion]:
        """Every promotion, refusal and roll-back, oldest first."""
        return self._champions.history(project)

    def promote(
        self,
        project: str,
        card: ModelCard,
        *,
        comparison: Comparison | None = None,
        gate: Gate,
        force: bool = False,
        actor: str | None = None,
        reason: str = "",
    ) -> Promotion:
        """Make a candidate the champion, if the gate lets it.

        The first champion needs a report and no comparison. Promoting the present champion again changes nothing and
        gives its promotion, so a caller who was killed may simply try again.

        Args:
            card: of a model in this registry (`card(id)`).
            comparison: candidate against the present champion.
            force: overrule the gate; needs a `reason`, and the record says so.
            actor: who decides; by default the user's login name.

        Raises:
            GateRefused: with all reasons; the refusal is in the history and the champion stays.
            RegistryError: unknown model, a comparison of other models, or another promotion came first.
        """
        if self.artifact(card.id).kind != "model":
            raise RegistryError(f"{card.name} ({card.id[:12]}) is not a model")
        evidence = Evidence(
            report=self._newest_report(card.id, comparison), contamination=self._contamination(card.id, comparison)
        )
        return self._champions.promote(
            project,
            card,
            comparison=comparison,
            evidence=evidence,
            gate=gate,
            force=force,
            actor=actor,
            reason=reason,
        )

    def rollback(self, project: str, *, to: str | None = None, actor: str | None = None, reason: str = "") -> Promotion:
        """Bring back the champion before this one, or an earlier one (id, prefix or name).

        Rolling back twice goes back two champions.

        Raises:
            RegistryError: there is none, or its weights are gone.
        """
        return self._champions.rollback(project, to=to, actor=actor, reason=reason)

    # What the methods above stand on

    def _newest_report(self, model: str, comparison: Comparison | None) -> EvalReport | None:
        rows = self._database.reports(model, comparison.suite if comparison else None)
        return self.report(rows[0]["artifact"]) if rows else None

    def _contamination(self, model: str, comparison: Comparison | None) -> dict[str, float | None]:
        """Per dataset upwards of the model the fraction of the suite that it touches; without a suite, the worst."""
        found: dict[str, float | None] = {}
        for node in self.lineage(model).nodes:
            if node.kind != "dataset":
                continue
            known = node.meta.get("contamination")
            if not isinstance(known, Mapping):
                found[node.name] = None
            elif comparison is not None:
                found[node.name] = known.get(comparison.suite)
            else:
                found[node.name] = max(known.values(), default=None)
        return found

    def _bring(self, source: Path | str | bytes, artifact_id: str, name: str, storage: Storage) -> tuple[Path, int]:
        if isinstance(source, bytes):
            return self._store.put_bytes(source, artifact_id, _file_name(name)), len(source)
        path = Path(source).resolve()
        return path if storage == "reference" else self._store.put(path, artifact_id, storage), num_bytes(path)

    def _link(self, artifact_id: str, name: str, parents: Iterable[str]) -> None:
        if self._database.named(name) != artifact_id:
            self._database.put_name(name, artifact_id)
        for parent in parents:
            if parent != artifact_id:  # training that changed nothing gives its own parent back
                self._database.put_parent(artifact_id, parent)

    def _holds(self, row: Row) -> bool:
        return bool(row["storage"] != "reference" and (self._root / row["path"]).exists())

    def _artifact(self, row: Row) -> Artifact:
        plain = {**row, **{name: from_json(row[name]) for name in ("files", "meta", "code")}}
        return Artifact(
            **{**plain, "path": str(self._root / row["path"]), "parents": tuple(self._database.parents(row["id"]))}
        )

    def _relative(self, path: Path) -> str:
        """Relative to the registry's folder where it lies inside, so that the folder may be moved."""
        return str(path.relative_to(self._root) if path.is_relative_to(self._root) else path)

    def _resolve(self, ref: str) -> str:
        if self._database.artifact(ref) is not None:
            return ref
        named = self._database.named(ref)
        if named is not None:
            return named
        fits = self._database.artifact_ids(ref) if len(ref) >= MIN_PREFIX else []
        if len(fits) != 1:
            near = fits or [*self._database.all_names(), *(row["id"] for row in self._database.artifacts(None))]
            raise RegistryError(unknown("artifact", ref, near, several=bool(fits)))
        return fits[0]


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "content"
