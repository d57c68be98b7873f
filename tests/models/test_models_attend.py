from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.core import ModelError
from posttrain.models import CausalAttend, Decoder, DecoderConfig, packed_positions, token_stats
from posttrain.models.attend import _make_buckets


def naive(
    q_THK: torch.Tensor, k_TJK: torch.Tensor, v_TJK: torch.Tensor, lengths: list[int], window: int | None
) -> torch.Tensor:
    """Attention as the formula says it: a dense mask over the whole row."""
    groups = q_THK.shape[1] // k_TJK.shape[1]
    k_THK, v_THK = k_TJK.repeat_interleave(groups, 1), v_TJK.repeat_interleave(groups, 1)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    age = torch.arange(len(sequence))[:, None] - torch.arange(len(sequence))
    seen = (age >= 0) & (sequence[:, None] == sequence)
    if window is not None:
        seen &= age < window
    scores = torch.einsum("qhk,thk->hqt", q_THK, k_THK) * q_THK.shape[-1] ** -0.5
    return torch.einsum("hqt,thk->qhk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v_THK)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7),
    window=st.sampled_from([None, 1, 3, 8, 40]),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_packed_attention_and_its_gradient_equal_the_formula(
    lengths: list[int], window: int | None, kv_heads: int
) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    shapes = [(1, sum(lengths), heads, 8) for heads in (4, kv_heads, kv_heads)]
    qkv = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    pull = torch.randn(shapes[0], generator=generator)
    expected = naive(*(x[0] for x in qkv), lengths, window)[None]
    expected_grads = torch.autograd.grad(expected, qkv, pull)
    out = CausalAttend(lengths)(0, *qkv, window=window)
    assert torch.allclose(out, expected, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(out, qkv, pull), expected_grads, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_buckets_hold_every_token_once_and_never_double_a_length(lengths: list[int]) -> None:
    buckets = _make_buckets(lengths, torch.device("cpu"))
    assert sorted(torch.cat([bucket.tokens for bucket in buckets]).tolist()) == list(range(sum(lengths)))
    for bucket in buckets:
        assert len(set(bucket.slots.tolist())) == len(bucket.tokens)
        assert bucket.num * bucket.longest < 2 * len(bucket.tokens)
    assert len(buckets) <= 10


def test_packed_gradient_equals_the_gradients_of_separate_sequences(
    config: DecoderConfig, generator: torch.Generator
) -> None:
    lengths = [7, 19, 1, 12, 8, 3]
    rows = [torch.randint(0, 31, (1, length), generator=generator) for length in lengths]
    packed, separate = Decoder.random(config, seed=4), Decoder.random(config, seed=4)
    tokens = torch.cat(rows, 1)
    hidden = packed.hidden(tokens, positions_BT=packed_positions(lengths), attend=CausalAttend(lengths))
    packed_loss = token_stats(packed, hidden[0], tokens[0]).logprobs_N.sum()
    packed_loss.backward()
    total = 0.0
    for row in rows:
        loss = token_stats(separate, separate.hidden(row)[0], row[0]).logprobs_N.sum()
        loss.backward()
        total += loss.item()
    assert packed_loss.item() == pytest.approx(total, rel=1e-5)
    for (name, mine), theirs in zip(packed.named_parameters(), separate.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4), name


def test_positions_begin_anew() -> None:
    assert packed_positions([3, 1, 2]).tolist() == [[0, 1, 2, 0, 0, 1]]


def test_lengths_that_do_not_fit_are_refused(llama: Decoder) -> None:
    with pytest.raises(ModelError, match=r"sum\(lengths\) = 9 tokens, not \(1, 8\)"):
        llama(torch.zeros(1, 8, dtype=torch.long), lengths=[4, 5], positions_BT=torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ModelError, match="at least 1"):
        CausalAttend([3, 0])
