"""The head that keeps its logits in the cache, against fp64 on the same rounded numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.models import token_stats, token_stats_tiled

pytestmark = pytest.mark.skipif(not token_stats_tiled.supported(), reason="no AVX-512 bf16, or no C compiler")


class Head:
    """An output head alone."""

    exact_logits = True

    def __init__(self, weight_VD: Tensor) -> None:
        self.weight_VD = weight_VD

    def head_weight(self) -> Tensor:
        return self.weight_VD


def draw(num: int, width: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num)
    hidden = torch.randn(num, width, generator=generator).bfloat16().float()
    weight = (0.3 * torch.randn(vocab, width, generator=generator)).bfloat16().float()
    return hidden, weight, torch.randint(0, vocab, (num,), generator=generator)


# one row, one column; sizes that fill no tile; several blocks of the vocabulary; an odd one at the end
@pytest.mark.parametrize(
    ("num", "width", "vocab"), [(1, 2, 1), (5, 2, 3), (49, 16, 31), (100, 64, 1000), (7, 130, 5003), (61, 32, 2049)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
def test_logprobs_entropies_and_gradients(num: int, width: int, vocab: int, temperature: float, entropy: bool) -> None:
    hidden, weight, targets = draw(num, width, vocab)
    pull, pull_entropy = torch.randn(num), torch.randn(num)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        stats = token_stats(Head(weight), hidden, targets, temperature=temperature, entropy=entropy)
    assert stats.logprobs_N.grad_fn.name() == "_TiledBackward"
    hidden_64, weight_64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    log_p = torch.log_softmax(hidden_64 @ weight_64.T / temperature, -1)
    logprobs, entropies = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    assert torch.allclose(stats.logprobs_N.double(), logprobs, atol=3e-5)
    loss, exact = (stats.logprobs_N * pull).sum(), (logprobs * pull).sum()
    if entropy:
        assert torch.allclose(stats.entropy_N.double(), entropies, atol=3e-5)
        loss, exact = loss + (stats.entropy_N * pull_entropy).sum(), exact + (entropies * pull_entropy).sum()
    else:
        assert stats.entropy_N is None
    grads = torch.autograd.grad(loss, [hidden, weight])
    for mine, theirs in zip(grads, torch.autograd.grad(exact, [hidden_64, weight_64]), strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() <= 0.01 * theirs.abs().max() + 1e-6
        if theirs.abs().max() > 1e-6:
            assert torch.nn.functional.cosine_similarity(mine.double().flatten(), theirs.flatten(), dim=0) > 0.9999


def test_only_what_learns_gets_a_gradient() -> None:
    hidden, weight, targets = draw(20, 16, 31)
    for learns in (hidden, weight):
        learns.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            token_stats(Head(weight), hidden, targets).logprobs_N.sum().backward()
        assert learns.grad is not None
        learns.requires_grad_(False)
    both = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        token_stats(Head(weight), hidden, targets).logprobs_N.sum().backward()
    assert torch.equal(both[0], hidden.grad)
    assert torch.equal(both[1], weight.grad)


def test_does_not_depend_on_the_number_of_threads() -> None:
    hidden, weight, targets = draw(1100, 64, 3000)
    weight.requires_grad_(), hidden.requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.autocast("cpu", torch.bfloat16):
                stats = token_stats(Head(weight), hidden, targets)
            results.append((stats.logprobs_N, *torch.autograd.grad(stats.logprobs_N.sum(), [hidden, weight])))
    finally:
        torch.set_num_threads(before)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_number_that_is_none_stays_in_its_row() -> None:
    hidden, weight, targets = draw(20, 16, 31)
    hidden[3] = torch.nan
    with torch.autocast("cpu", torch.bfloat16):
        logprobs = token_stats(Head(weight), hidden, targets).logprobs_N
    assert torch.isnan(logprobs).tolist() == [index == 3 for index in range(20)]


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_logits_far_apart_overflow_nowhere(scale: float) -> None:
    hidden, weight, targets = draw(20, 16, 31)
    with torch.autocast("cpu", torch.bfloat16):
        stats = token_stats(Head(weight), hidden * scale, targets, entropy=True)
    assert torch.isfinite(stats.logprobs_N).all()
    assert (stats.logprobs_N <= 0).all()
    assert stats.entropy_N is not None
    assert (stats.entropy_N >= -1e-6).all()


def test_fp32_products_and_odd_widths_go_the_plain_way() -> None:
    hidden, weight, targets = draw(20, 16, 31)
    assert token_stats_tiled.fits(hidden, weight, torch.bfloat16, exact=True)
    assert token_stats_tiled.fits(hidden, weight.bfloat16(), torch.bfloat16, exact=False)
    assert not token_stats_tiled.fits(hidden, weight.bfloat16(), torch.bfloat16, exact=True)
    assert not token_stats_tiled.fits(hidden, weight, torch.float32, exact=True)
    assert not token_stats_tiled.fits(hidden[:, :15], weight[:, :15], torch.bfloat16, exact=True)
    weight.requires_grad_()
    plain = token_stats(Head(weight), hidden, targets).logprobs_N
    assert plain.grad_fn.name() == "_TokenStatsBackward"
    with torch.autocast("cpu", torch.bfloat16):
        odd = token_stats(Head(weight[:, :15]), hidden[:, :15], targets).logprobs_N
    assert torch.isfinite(odd).all()
