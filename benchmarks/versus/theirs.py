"""The peers' side of the comparison: `transformers` generate and TRL's trainers, each in the best of its own settings.

Run by the parent in an environment without anything of ours; see `protocol`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from versus.matmul_peak import matmul_peak
from versus.protocol import Runner, serve


def prepare(workload: Mapping[str, Any], inputs: Mapping[str, Any]) -> Runner:
    """Load a workload, find its best setting, and warm it."""
    from versus import theirs_generate, theirs_train

    makers = {
        "sampling": theirs_generate.sampling_runner,
        "turns": theirs_generate.turns_runner,
        "first_token": theirs_generate.first_token_runner,
        "grpo": theirs_train.grpo_runner,
        "sft": theirs_train.sft_runner,
        "dpo": theirs_train.dpo_runner,
    }
    return makers[workload["kind"]](workload["sizes"], inputs)


if __name__ == "__main__":
    serve(prepare, matmul_peak)
