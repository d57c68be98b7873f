"""Artifact: a model, dataset, report or tokenizer that the registry knows by its content."""

from __future__ import annotations

from typing import Any

from posttrain.core import Record
from posttrain.registry.content import Storage


class Artifact(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="artifact/1"):
    """Something that was made, and what it was made from."""

    id: str  # SHA-256 of the content
    kind: str  # "model", "dataset", "report", "tokenizer" …
    name: str  # the name it came under first
    path: str  # absolute
    storage: Storage  # where the content lies: copied or hard-linked into the store, or left in place
    num_bytes: int
    files: dict[str, str]  # relative path → SHA-256; "" for a single file
    parents: tuple[str, ...] = ()  # ids
    meta: dict[str, Any] = {}
    code: dict[str, str] = {}  # package version and git commit that registered it
    run: str | None = None
    created_s: float = 0.0  # Unix time

    def short(self) -> str:
        """Twelve digits of the id: enough for people."""
        return self.id[:12]
