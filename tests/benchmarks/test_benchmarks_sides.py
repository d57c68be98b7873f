"""Both sides of the comparison, in a size of seconds: they do the work that the inputs say, no more and no less."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from versus import matmul_peak, ours
from versus.catalogue import Workload, tiny_catalogue
from versus.inputs import make_inputs, texts_of
from versus.protocol import Worker
from versus.shapes import SHAPES, make_folder

from posttrain.models import DecoderConfig

WORKLOADS = {workload.name: workload for workload in tiny_catalogue()}
EACH_KIND = ("uniform-3m-64", "mixed-3m", "turns-25m", "first-token-25m", "grpo-mixed-3m", "sft-3m", "dpo-3m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(SHAPES["tiny"], tmp_path_factory.mktemp("models"), None, texts_of(None))


@pytest.mark.parametrize("name", EACH_KIND)
def test_ours_does_the_work(name: str, folder: Path) -> None:
    workload = WORKLOADS[name]
    inputs = make_inputs(workload, folder, None)
    runner = ours.prepare(workload.to_dict(), json.loads(json.dumps(inputs)))
    for _ in range(2):
        measured = runner.run()
        assert measured["work"] == inputs["work"]
        assert measured["seconds"] > 0


@pytest.mark.slow
def test_theirs_does_the_same_work(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    script, log = Path(ours.__file__).with_name("theirs.py"), tmp_path / "log"
    worker = Worker(Path(sys.executable), script, threads=1, log=log, search=False)
    for name in ("mixed-3m", "turns-25m", "grpo-mixed-3m", "sft-3m", "dpo-3m"):
        inputs = make_inputs(WORKLOADS[name], folder, None)
        file = tmp_path / "inputs.json"
        file.write_text(json.dumps(inputs))
        worker.ask({"do": "prepare", "workload": WORKLOADS[name].to_dict(), "inputs": str(file)}, timeout_s=300)
        assert worker.ask({"do": "run"}, timeout_s=120)["work"] == inputs["work"], name
    worker.close()


def test_inputs_are_the_same_for_everybody_and_fit_the_model(folder: Path) -> None:
    for workload in WORKLOADS.values():
        inputs = make_inputs(workload, folder, None)
        assert inputs == make_inputs(workload, folder, None)
        for prompt in inputs.get("prompts", []):
            low, high = workload.sizes["prompt_tokens"]
            assert low <= len(prompt) <= high
            assert max(prompt) < SHAPES["tiny"].vocab_size


def test_operations_are_counted_as_by_hand(folder: Path) -> None:
    """Two tokens of a prompt, two written: logits at the last of the prompt and at the first that was written."""
    sizes: dict[str, Any] = {"prompts": 1, "siblings": 2, "prompt_tokens": (2, 2), "new_tokens": 2, "mixed": False}
    workload = Workload(name="hand", kind="sampling", shape="tiny", unit="tokens", sizes=sizes)
    config = DecoderConfig.from_hf(json.loads((folder / "config.json").read_text()))
    layer = 64 * (4 + 2 * 2) * 16 + 4 * 16 * 64 + 64 * 176 * 3
    body = 2 * 2 * layer  # per token: two layers, two operations per weight
    head = 2 * config.vocab_size * 64
    attention = 4 * 4 * 16 * 2  # per token seen: both layers
    read = 2 * (body + attention * 1) + head
    written = body + attention * 3 + head
    assert make_inputs(workload, folder, None)["flops"] == read + 2 * written


def test_the_vocabulary_of_a_made_tokenizer_fits(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    assert values["vocab_size"] == 512
    assert values["eos_token_id"] != values["pad_token_id"]


def test_peak_is_the_best_of_several_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul_peak, "SHAPES", ((64, 64, 64),))
    peak = matmul_peak.matmul_peak()
    assert peak["fp32"] > 1e6
    assert peak["bf16"] > 1e6


def test_a_row_ends_at_its_length_and_not_before() -> None:
    pytest.importorskip("transformers")
    from versus.theirs_generate import EndAt

    end = EndAt([2, 1], eos=3)
    tokens_BT = torch.zeros(2, 5, dtype=torch.long)
    first_BV = end(tokens_BT, torch.zeros(2, 4))
    assert first_BV[0].tolist() == [0, 0, 0, -float("inf")]  # one token more to come: no end yet
    assert first_BV[1].tolist() == [-float("inf")] * 3 + [0.0]  # its only token
    second_BV = end(torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 4))
    assert second_BV[0].tolist() == [-float("inf")] * 3 + [0.0]
