"""Decoding attention: the compiled kernel and the fallbacks, against PyTorch's in fp32."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from posttrain.core import Sampling
from posttrain.engine import LocalEngine, native
from posttrain.engine.attention import SingleTokens
from posttrain.engine.cache import SlotCache
from posttrain.models import native as compiling

SHAPES = [  # rows, query heads, key-value heads, head width, window
    (5, 8, 4, 32, None),
    (3, 4, 4, 32, None),
    (3, 12, 2, 32, 7),
    (2, 4, 4, 64, None),
    (4, 8, 1, 64, 70),
    (1, 6, 2, 128, None),
    (6, 3, 3, 24, 5),
    (2, 4, 2, 80, 1),
]


@pytest.fixture(params=["compiled", "pytorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the compiled kernel, and without it."""
    if request.param == "pytorch":
        monkeypatch.setenv("POSTTRAIN_NATIVE", "0")
    forget()
    if request.param == "compiled" and native.decode_attention(torch.float32) is None:
        pytest.skip("no C compiler on this machine")
    yield request.param
    forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_single_tokens_attend_to_what_they_may_see(way: str, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    num, heads, kv_heads, width, window = shape
    draw = torch.Generator().manual_seed(0)
    cache = SlotCache(
        num_layers=2,
        num_slots=8,
        num_kv_heads=kv_heads,
        max_length=160,
        head_dim=width,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    for store in (*cache.keys, *cache.values):
        store.copy_(torch.randn(store.shape, generator=draw))
    before = [store.clone() for store in (*cache.keys, *cache.values)]
    lengths = torch.tensor([0, 1, 64, 130, 159, 7][:num])
    fused = torch.randn(num, 1, heads + 2 * kv_heads, width, generator=draw).to(dtype)
    q, k, v = fused.split([heads, kv_heads, kv_heads], dim=2)  # strided, as a fused projection gives them
    attend = SingleTokens(cache, lengths, int(lengths.max()), ragged=num > 1)
    out = attend(1, q, k, v, window=window)
    assert out.shape == (num, 1, heads, width)
    assert out.dtype == dtype
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(cache.keys[1][row, :, length], k[row, 0])
        assert torch.equal(cache.values[1][row, :, length], v[row, 0])
        first = 0 if window is None else max(0, length + 1 - window)
        keys, values = (store[1][row, :, first : length + 1].float() for store in (cache.keys, cache.values))
        want = F.scaled_dot_product_attention(q[row].transpose(0, 1).float(), keys, values, enable_gqa=True)
        tolerance = 2e-6 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(out[row].transpose(0, 1).float(), want, atol=tolerance, rtol=tolerance)
    # Nothing else was written: not the other layer, not the free slots, not the other positions.
    for store, old in zip((*cache.keys, *cache.values), before, strict=True):
        changed = (store != old).any(-1).any(1)
        expected = torch.zeros_like(changed)
        if store is cache.keys[1] or store is cache.values[1]:
            expected[torch.arange(num), lengths] = True
        assert not (changed & ~expected).any()


def test_extreme_scores_and_nan(way: str) -> None:
    cache = SlotCache(
        num_layers=1,
        num_slots=3,
        num_kv_heads=1,
        max_length=200,
        head_dim=32,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.values[0].copy_(torch.randn(cache.values[0].shape, generator=torch.Generator().manual_seed(0)))
    q = torch.ones(3, 1, 1, 32)
    cache.keys[0][0, 0, 5] = 1000.0  # one key wins by far
    cache.keys[0][1] = -1000.0  # all equally bad
    q[2] = math.nan
    lengths = torch.tensor([150, 150, 150])
    new = torch.zeros(3, 1, 1, 32)
    new[1] = -1000.0
    out = SingleTokens(cache, lengths, 150, ragged=False)(0, q, new, torch.zeros(3, 1, 1, 32), window=None)
    torch.testing.assert_close(out[0, 0, 0], cache.values[0][0, 0, 5])
    torch.testing.assert_close(out[1, 0, 0], cache.values[0][1, 0, :151].mean(0), atol=1e-5, rtol=1e-4)
    assert out[2].isnan().all()


def test_the_engine_samples_the_same_either_way(
    make_engine: Callable[..., LocalEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["short", "a rather longer prompt than the other", "x"]
    sampling = Sampling(max_tokens=40, seed=3, n=2, ignore_eos=True)
    forget()
    compiled = make_engine().generate(prompts, sampling)
    monkeypatch.setenv("POSTTRAIN_NATIVE", "0")
    forget()
    plain = make_engine().generate(prompts, sampling)
    forget()
    assert [completion.tokens for completion in compiled] == [completion.tokens for completion in plain]


def forget() -> None:
    native.decode_attention.cache_clear()
    compiling.load_native.cache_clear()


def test_a_compiler_that_fails_or_is_missing_leaves_pytorch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert native.decode_attention(torch.float32) is None
    forget()
    monkeypatch.setattr(compiling.shutil, "which", lambda name: "/bin/false")
    assert native.decode_attention(torch.float32) is None
    assert "could not be compiled" in caplog.text
    forget()
    assert native.decode_attention(torch.float16) is None


def test_the_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    if compiling.shutil.which("cc") is None:
        pytest.skip("no C compiler on this machine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    assert native.decode_attention(torch.bfloat16) is not None
    assert len(list((tmp_path / "posttrain" / "native").iterdir())) == 1
    forget()

    def no_compiling(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", no_compiling)
    assert native.decode_attention(torch.bfloat16) is not None
    forget()
