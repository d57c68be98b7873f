"""Between the database's rows and records: nested values are JSON text in a row."""

from __future__ import annotations

from typing import Any

import msgspec

from posttrain.registry.database import Row
from posttrain.registry.lineage import LineageNode
from posttrain.registry.run_folder import RunState


def to_json(value: Any) -> str:
    """JSON text of plain values; paths and the like become their text."""
    return msgspec.json.encode(value, enc_hook=str).decode()


def from_json(text: str) -> dict[str, Any]:
    """The inverse of `to_json`."""
    plain: dict[str, Any] = msgspec.json.decode(text)
    return plain


def run_state(row: Row) -> RunState:
    """A row of runs."""
    return RunState(
        id=row["id"],
        recipe=row["recipe"],
        status=row["status"],
        started=row["started_s"],
        ended=row["ended_s"],
        fingerprint=row["fingerprint"],
        code=from_json(row["code"]),
    )


def run_node(state: RunState) -> LineageNode:
    """A run as a node of a lineage."""
    return LineageNode(
        id=state.id,
        kind="run",
        name=state.recipe,
        meta={"fingerprint": state.fingerprint, "status": state.status},
        code=state.code,
        created_s=state.started,
    )
