"""registry: artifacts ↔ store; runs, lineage, promotion and roll-back.

Takes files, folders and records; gives artifacts, model cards, lineage and promotions. May import: core. Never torch.
"""

from posttrain.registry.code_version import code_version
from posttrain.registry.events import Event
from posttrain.registry.run_folder import RunFolder, RunState, Status, list_runs, new_run_id

__all__ = ["Event", "RunFolder", "RunState", "Status", "code_version", "list_runs", "new_run_id"]
