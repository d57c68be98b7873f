"""Counted costs, and the benchmarks of scale: small, but whole."""

from __future__ import annotations

import xml.etree.ElementTree
from pathlib import Path

import pytest
import quick
import scaling_compute
import scaling_storage
import torch
from op_counts import Counts, count
from scaling_plot import write_chart


def test_operators_bytes_and_calls_are_counted() -> None:
    x = torch.ones(8, 4)
    counts, ops = count(lambda: (x + 1).view(4, 8).mul_(2))
    assert ops == {"aten.add.Tensor": 1, "aten.view.default": 1, "aten.mul_.Tensor": 1}
    assert counts.ops == 3
    assert counts.new_bytes == 8 * 4 * 4  # the sum; the view and the product in place are of the same storage
    assert counts.python_calls >= 4
    assert counts.onednn == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_products_of_onednn_are_counted() -> None:
    x, weight = torch.ones(64, 32, dtype=torch.bfloat16), torch.ones(16, 32, dtype=torch.bfloat16)
    counts, _ = count(lambda: torch.nn.functional.linear(x, weight))
    assert counts.onednn >= 1


def test_differences_of_counts_per_step() -> None:
    assert (Counts(10, 8, 6, 4, 2) - Counts(2, 4, 6, 0, 0)) / 2 == Counts(4, 2, 0, 2, 1)


def test_a_count_that_rises_is_reported_and_one_that_falls_too() -> None:
    before = {"step": {"ops": 1000.0, "new_bytes": 1000.0, "python_calls": 1000.0}}
    assert quick.compare({"step": {"ops": 1009.0, "new_bytes": 1000.0, "seconds": 9.0}}, before) == ([], [])
    rose, fell = quick.compare({"step": {"ops": 1012.0, "new_bytes": 900.0, "python_calls": 1000.0}}, before)
    assert rose == ["step: ops 1,000.0 → 1,012.0"]
    assert fell == ["step: new_bytes 1,000.0 → 900.0"]
    assert quick.compare({"new": {"ops": 5.0}}, before) == ([], [])


def test_the_baseline_names_what_is_counted() -> None:
    import json

    baseline = json.loads(quick.BASELINE.read_text())
    assert any(name.startswith("decode step") for name in baseline)
    assert all(set(counts) <= set(quick.TOLERANCE) for counts in baseline.values())


def test_stores_answer_at_every_size(tmp_path: Path) -> None:
    rates, latencies = scaling_storage.interaction_log(tmp_path, [30, 60])
    assert all([at for at, _ in points] == [30, 60] for points in (rates | latencies).values())
    assert all(value > 0 for points in (rates | latencies).values() for _, value in points)
    found = scaling_storage.registry(tmp_path, [40, 80])
    assert set(found) == {"add_artifact", "artifact by id", "artifact by prefix", "artifact by name", "lineage"}
    assert all([at for at, _ in points] == [40, 80] for points in found.values())


def test_memory_of_a_mixture_is_measured(tmp_path: Path) -> None:
    points = scaling_storage.mixture_memory(tmp_path, [100_000, 2_000_000])
    assert [at for at, _ in points] == [0.1, 2.0]
    assert points[1][1] < points[0][1] + 20  # MB: a file twenty times as long
    assert not (tmp_path / "large.jsonl").exists()


def test_rates_and_the_scheduler_are_measured() -> None:
    model = scaling_compute.make_model(width=32, num_layers=1, num_heads=1, num_kv_heads=1, mlp_width=32)
    assert scaling_compute.sampling_rate(model, prompts=2, siblings=2, new_tokens=4, reps=1) > 0
    assert scaling_compute.training_rate(model, rows=2, length=16, reps=1) > 0
    points = scaling_compute.scheduler_overhead([0, 50], reps=1)
    assert [at for at, _ in points] == [0, 50]


def test_a_chart_is_a_drawing_of_its_own(tmp_path: Path) -> None:
    series = {"ours & theirs": [(1.0, 10.0), (2.0, 30.0)], "other": [(1.0, 5.0), (2.0, 6.0)]}
    file = write_chart(tmp_path / "a" / "chart.svg", "Rate < 1", series, x="rows", y="tokens/s")
    root = xml.etree.ElementTree.parse(file).getroot()
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"Rate < 1", "rows", "tokens/s", "ours & theirs", "other"} <= set(texts)
    assert sum(element.tag.endswith("path") for element in root.iter()) == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        write_chart(file, "empty", {"none": [(1.0, float("nan"))]}, x="x", y="y")
