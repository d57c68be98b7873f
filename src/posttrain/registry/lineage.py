"""Lineage: which data, code, recipe and parents made an artifact, up to where they come from."""

from __future__ import annotations

from typing import Any

from posttrain.core import Record


class LineageNode(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An artifact or a run."""

    id: str
    kind: str  # the artifact's kind, or "run"
    name: str
    meta: dict[str, Any] = {}
    code: dict[str, str] = {}
    created_s: float = 0.0

    def line(self) -> str:
        """One line for people."""
        if self.kind != "run":
            return f"{self.kind} {self.name}  {self.id[:12]}"
        code = self.code.get("posttrain", "?")
        if "commit" in self.code:
            commit, _, dirty = self.code["commit"].partition("-")
            code += f" @ {commit[:10]}{'-' + dirty if dirty else ''}"
        return f"run {self.id}  recipe {self.name}, settings {self.meta.get('fingerprint', '?')}, posttrain {code}"


class LineageEdge(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`child` came from `parent`."""

    child: str
    parent: str
    relation: str  # "made by" a run, "made from" an artifact


class Lineage(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="lineage/1"):
    """Everything upwards of one artifact. `nodes[0]` is the artifact itself."""

    nodes: tuple[LineageNode, ...]
    edges: tuple[LineageEdge, ...]

    def root(self) -> LineageNode:
        """The artifact whose lineage this is."""
        return self.nodes[0]

    def node(self, node_id: str) -> LineageNode:
        """One node by its full id."""
        return next(node for node in self.nodes if node.id == node_id)

    def parents(self, node_id: str) -> list[LineageNode]:
        """What a node came from, in order."""
        return [self.node(edge.parent) for edge in self.edges if edge.child == node_id]

    def tree(self) -> str:
        """Drawn as a tree; what was drawn before is named and not drawn again."""
        lines = [self.root().line()]
        self._draw(self.root().id, "", lines, {self.root().id})
        return "\n".join(lines)

    def _draw(self, node_id: str, indent: str, lines: list[str], seen: set[str]) -> None:
        parents = self.parents(node_id)
        for place, parent in enumerate(parents, 1):
            last = place == len(parents)
            again = parent.id in seen and bool(self.parents(parent.id))
            lines.append(f"{indent}{'└─ ' if last else '├─ '}{parent.line()}{'  (see above)' if again else ''}")
            if parent.id not in seen:
                seen.add(parent.id)
                self._draw(parent.id, indent + ("   " if last else "│  "), lines, seen)
