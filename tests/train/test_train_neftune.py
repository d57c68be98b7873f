"""NEFTune's noise, and the normalisers of supervised fine-tuning."""

from __future__ import annotations

import pytest
import torch

from posttrain import models, train
from posttrain.core import ConfigError, Example, TokenSequence
from posttrain.train.forward import Pass


def embedded(model, forward, lengths):
    """What the first layer receives of a packed row, as a forward pass sees it."""
    seen = []

    def watched(decoder, batch, row):
        seen.append(decoder.embed(row.tokens_N[None])[0])

    forward(watched)(model, None, Pass(torch.arange(sum(lengths)) % 48, lengths, 1.0, False))
    return seen[0].detach()


def test_noise_has_the_reach_of_its_own_sequence(make_model):
    model = make_model().train()
    lengths = [4, 36, 60]
    torch.manual_seed(0)
    noisy = embedded(model, lambda forward: train.noisy_embeddings(forward, 5.0), lengths)
    noise = noisy - model.embed(torch.arange(100) % 48).detach()
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        reach = 5.0 / (length * 32) ** 0.5  # 32 numbers per token
        assert part.abs().max() <= reach
        assert part.abs().max() > 0.95 * reach
        assert part.std() == pytest.approx(reach / 3**0.5, rel=0.15), "uniform"
        assert part.mean().abs() < 0.2 * reach
    assert not model.embed._forward_hooks, "the hook is gone"


def test_no_noise_outside_training(make_model, make_examples):
    noisy = train.noisy_embeddings(train.token_forward, 10.0)
    examples = make_examples(6)
    pair = [
        train.Trainer(make_model(), train.TrainConfig(lr=1e-3), train.nll_objective, forward=forward)
        for forward in (noisy, train.token_forward)
    ]
    assert pair[0].evaluate(examples) == pair[1].evaluate(examples)
    assert pair[0].logprobs(examples) == pair[1].logprobs(examples)
    losses = [trainer.step(examples)["loss"] for trainer in pair]
    assert losses[0] != losses[1]
    again = train.Trainer(make_model(), train.TrainConfig(lr=1e-3), train.nll_objective, forward=noisy)
    assert again.step(examples)["loss"] == losses[0], "the noise is the seed's, the step's and the micro-batch's"
    with pytest.raises(ConfigError, match="alpha must be above 0"):
        train.noisy_embeddings(train.token_forward, 0.0)


def test_noise_reaches_a_scored_decoder_too(make_model, make_examples):
    model = models.ScoredDecoder(make_model())
    forward = train.noisy_embeddings(train.score_forward, 5.0)
    trainer = train.Trainer(
        model, train.TrainConfig(), lambda scores, batch: (scores.values_N.sum(), {}), forward=forward
    )
    assert trainer.step(make_examples(3))["grad_norm"] > 0


def two_examples(weights=(1.0, 1.0)):
    """One target of negative log-likelihood a; three of b, c, d."""
    return [
        Example(
            id=f"e{index}",
            sequences=(TokenSequence(tokens=(1, 2, 3, 4, 5)[: targets + 1], mask=(False, *[True] * targets)),),
            scalars={"weight": weight},
        )
        for index, (targets, weight) in enumerate(zip((1, 3), weights, strict=True))
    ]


@pytest.mark.parametrize("micro_tokens", [1, 1000])
def test_normalisers_by_hand(make_model, micro_tokens):
    config = train.TrainConfig(micro_tokens=micro_tokens)
    logprobs = train.Trainer(make_model(), config, train.nll_objective).logprobs(two_examples())
    (a,), (b, c, d) = ([-value for value in sequences[0][1:]] for sequences in logprobs)
    expected = {
        "token": (2 * a + 0.5 * (b + c + d)) / 4,
        "sequence": (2 * a + 0.5 * (b + c + d) / 3) / 2,
        "sum": 2 * a + 0.5 * (b + c + d),
    }
    for normalise, loss in expected.items():
        trainer = train.Trainer(make_model(), config, train.supervised_objective(normalise))
        metrics = trainer.step(two_examples(weights=(2.0, 0.5)))
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5), normalise
        assert metrics["nll"] == pytest.approx((a + b + c + d) / 4, rel=1e-5), "the metric is the same for all"
