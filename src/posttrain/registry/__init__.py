"""registry: artifacts ↔ store; runs, lineage, promotion and roll-back.

Takes files, folders and records; gives artifacts, model cards, lineage and promotions. May import: core. Never torch.
"""

from posttrain.registry.artifact import Artifact
from posttrain.registry.code_version import code_version
from posttrain.registry.content import folder_digest
from posttrain.registry.events import Event
from posttrain.registry.lineage import Lineage, LineageEdge, LineageNode
from posttrain.registry.promotion import Gate, Promotion
from posttrain.registry.registry import Registry
from posttrain.registry.run_folder import RunFolder, RunState, Status, list_runs, new_run_id

__all__ = [
    "Artifact",
    "Event",
    "Gate",
    "Lineage",
    "LineageEdge",
    "LineageNode",
    "Promotion",
    "Registry",
    "RunFolder",
    "RunState",
    "Status",
    "code_version",
    "folder_digest",
    "list_runs",
    "new_run_id",
]
