"""Which type of products a recipe takes where it is asked for none."""

from __future__ import annotations

import pytest
import torch

from posttrain.models import quickest_dtype


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, "float32"),
        ({"avx2": True, "avx512_f": True}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_bf16_only_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert quickest_dtype() == expected
    assert quickest_dtype("cpu") == expected
    assert quickest_dtype("cuda") == "bfloat16"


def test_a_torch_that_does_not_say_is_taken_for_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert quickest_dtype() == "float32"
