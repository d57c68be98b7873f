"""Learning from pairs and labelled answers: the same gradient however packed, and what is refused."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from posttrain import objectives, train
from posttrain.core import ConfigError, Example, TrainError

ORDINARY = {
    "dpo": train.preference_objective(partial(objectives.dpo_losses, beta=0.5), beta=0.5),
    "dpo_norm": train.preference_objective(lambda p: objectives.dpo_losses(p.per_token(), beta=5.0), beta=5.0),
    "rpo": train.preference_objective(partial(objectives.dpo_losses, beta=0.5), beta=0.5, nll_coef=0.2),
    "cpo": train.preference_objective(
        partial(objectives.dpo_losses, beta=0.5), beta=0.5, reference=False, nll_coef=1.0, nll_normalise="token"
    ),
    "simpo": train.preference_objective(
        partial(objectives.simpo_losses, beta=2.0, gamma=0.5), beta=2.0, reference=False, per_token_rewards=True
    ),
    "wpo_plain": train.preference_objective(
        partial(objectives.dpo_losses, beta=0.5), beta=0.5, pair_weights="wpo_plain"
    ),
    "kto": train.label_objective(objectives.kto, step={"kl": "kl"}, beta=0.5, undesirable_weight=1.5),
    "bco": train.label_objective(objectives.bco, step={"reward_shift": "reward_shift"}, beta=0.5),
}
LABELLED = {"kto", "bco"}


@pytest.fixture
def pairs(make_examples):
    return train.with_step_scalars(make_examples(20, num_sequences=2))


@pytest.fixture
def answers(make_examples):
    labelled = [
        example.replace(scalars={**example.scalars, "label": float(index % 3 == 0)})
        for index, example in enumerate(make_examples(20))
    ]
    return train.with_step_scalars(labelled, kl=0.7, reward_shift=0.1)


@pytest.fixture
def stepped(make_model, before_update):
    """A function that takes one step and gives the gradient and the metrics."""

    def take(examples, objective, *, forward=train.token_forward, **settings):
        model = make_model()
        trainer = train.Trainer(model, train.TrainConfig(max_grad_norm=0, **settings), objective, forward=forward)
        grads = {}
        before_update(
            trainer, lambda: grads.update({name: weight.grad.clone() for name, weight in model.named_parameters()})
        )
        return grads, trainer.step(examples)

    return take


def same(first, second, rtol=2e-5):
    scale = max(grad.abs().max().item() for grad in first.values())
    for name, grad in first.items():
        torch.testing.assert_close(second[name], grad, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ORDINARY)
def test_accumulated_is_one_batch(stepped, pairs, answers, name) -> None:
    examples = answers if name in LABELLED else pairs
    whole, whole_metrics = stepped(examples, ORDINARY[name], micro_tokens=100_000)
    parts, metrics = stepped(examples, ORDINARY[name], micro_tokens=60)
    assert whole_metrics["num_micro_batches"] == 1
    assert metrics["num_micro_batches"] > 4
    same(whole, parts)
    for key in whole_metrics.keys() - train.TIMING_METRICS - {"num_micro_batches"}:
        assert metrics[key] == pytest.approx(whole_metrics[key], rel=1e-4, abs=1e-6), key


def padded_logprobs(model, examples):
    """Sequence logprobs by a padded batch through the decoder's plain forward, and each sequence's targets."""
    sequences = [sequence for example in examples for sequence in example.sequences]
    longest = max(len(sequence.tokens) for sequence in sequences)

    def padded(rows, fill):
        return torch.tensor([[*row, *([fill] * (longest - len(row)))] for row in rows])

    tokens_BT = padded([sequence.tokens for sequence in sequences], 7)
    mask_BT = padded([sequence.mask for sequence in sequences], False)[:, 1:]
    logprobs_BT = model(tokens_BT)[:, :-1].log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])[..., 0]
    ref_BT = padded([sequence.columns["ref_logprobs"] for sequence in sequences], 0.0)[:, 1:]
    return (logprobs_BT * mask_BT).sum(1), (ref_BT * mask_BT).sum(1), mask_BT.sum(1), logprobs_BT, mask_BT


def test_packed_is_padded(stepped, make_model, make_examples) -> None:
    examples = train.with_step_scalars([example.replace(scalars={}) for example in make_examples(8, num_sequences=2)])
    packed, metrics = stepped(examples, ORDINARY["rpo"], micro_tokens=100_000)
    model = make_model()
    sums_S, ref_S, tokens_S, _, _ = padded_logprobs(model, examples)
    margin_E = (sums_S - ref_S)[::2] - (sums_S - ref_S)[1::2]
    loss = -torch.nn.functional.logsigmoid(0.5 * margin_E).mean() - 0.2 * (sums_S / tokens_S)[::2].mean()
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0.5 * margin_E.mean().item(), rel=1e-4)
    assert metrics["rewards/accuracies"] == pytest.approx((margin_E > 0).float().mean().item())
    same({name: weight.grad for name, weight in model.named_parameters()}, packed)


def test_the_nll_per_token_is_that_of_the_steps_tokens(stepped, make_model, make_examples) -> None:
    examples = train.with_step_scalars([each.replace(scalars={}) for each in make_examples(8, num_sequences=2)])
    only_nll = train.preference_objective(
        lambda p: torch.zeros_like(p.chosen_E), beta=1.0, nll_coef=1.0, nll_normalise="token"
    )
    _, metrics = stepped(examples, only_nll, micro_tokens=50)
    sums_S, _, tokens_S, _, _ = padded_logprobs(make_model(), examples)
    expected = -sums_S[::2].sum().item() / tokens_S[::2].sum().item()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["nll_loss"] == pytest.approx(expected, rel=1e-5)


def test_margin_weights_leave_tokens_out_of_the_preference_alone(stepped, make_model, make_examples) -> None:
    examples = [each.replace(scalars={}) for each in make_examples(6, num_sequences=2)]

    def without_last(sequence):
        last = max(index for index, is_target in enumerate(sequence.mask) if is_target)
        weights = tuple(float(index != last) for index in range(len(sequence.mask)))
        return sequence.replace(columns={**sequence.columns, "margin_weights": weights})

    examples = [
        each.replace(sequences=tuple(map(without_last, each.sequences)))
        for each in examples
        if all(sum(sequence.mask) > 1 for sequence in each.sequences)
    ]
    assert len(examples) >= 3
    _, metrics = stepped(examples, ORDINARY["rpo"])
    sums_S, _, tokens_S, logprobs_BT, mask_BT = padded_logprobs(make_model(), examples)
    kept_BT = mask_BT.clone()
    for row in range(len(kept_BT)):
        kept_BT[row, int(mask_BT[row].nonzero()[-1])] = False
    ref_S = torch.tensor(
        [
            sum(ref for ref, keep in zip(sequence.columns["ref_logprobs"][1:], kept, strict=False) if keep)
            for sequence, kept in zip(
                [sequence for each in examples for sequence in each.sequences], kept_BT.tolist(), strict=True
            )
        ]
    )
    ratio_S = (logprobs_BT * kept_BT).sum(1) - ref_S
    preference = -torch.nn.functional.logsigmoid(0.5 * (ratio_S[::2] - ratio_S[1::2])).mean().item()
    nll = -(sums_S / tokens_S)[::2].mean().item()
    assert metrics["loss"] == pytest.approx(preference + 0.2 * nll, rel=1e-5)


def test_the_collision_forward_is_the_sum_of_squares(stepped, make_model, make_examples) -> None:
    examples = [each.replace(scalars={}) for each in make_examples(6, num_sequences=2)]
    wpo = train.preference_objective(partial(objectives.dpo_losses, beta=0.5), beta=0.5, pair_weights="wpo")
    packed, metrics = stepped(examples, wpo, forward=train.collision_forward)
    model = make_model()
    sums_S, ref_S, tokens_S, logprobs_BT, mask_BT = padded_logprobs(model, examples)
    sequences = [sequence for each in examples for sequence in each.sequences]
    longest = max(len(sequence.tokens) for sequence in sequences)
    tokens_BT = torch.tensor([[*each.tokens, *([7] * (longest - len(each.tokens)))] for each in sequences])
    probs_BTV = model(tokens_BT)[:, :-1].softmax(-1)
    aligned_BT = logprobs_BT - probs_BTV.square().sum(-1).log()
    weights_S = ((aligned_BT * mask_BT).sum(1) / tokens_S).exp().detach()
    margin_E = (sums_S - ref_S)[::2] - (sums_S - ref_S)[1::2]
    loss = -(torch.nn.functional.logsigmoid(0.5 * margin_E) * weights_S[::2] * weights_S[1::2]).mean()
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    same({name: weight.grad for name, weight in model.named_parameters()}, packed)
    with pytest.raises(TrainError, match="collision_forward"):
        stepped(examples, wpo)


def test_the_reference_itself_gives_log_two_and_no_margin(make_model, make_examples) -> None:
    trainer = train.Trainer(make_model(), train.TrainConfig(lr=1e-2), ORDINARY["dpo"])
    examples = [each.replace(scalars={}) for each in make_examples(6, num_sequences=2)]
    columns = trainer.logprobs(examples)
    referred = [
        each.replace(
            sequences=tuple(
                sequence.replace(columns={"ref_logprobs": column})
                for sequence, column in zip(each.sequences, own, strict=True)
            )
        )
        for each, own in zip(examples, columns, strict=True)
    ]
    first = trainer.step(referred)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["rewards/margins"] == 0.0
    later = [trainer.step(referred) for _ in range(20)][-1]
    assert later["loss"] < 0.3
    assert later["rewards/accuracies"] == 1.0


# AOT


def test_a_sorting_loss_wants_the_whole_step_in_one_micro_batch(stepped, make_examples) -> None:
    examples = [each.replace(scalars={}) for each in make_examples(8, num_sequences=2)]
    aot = train.preference_objective(partial(objectives.aot_losses, beta=0.5), beta=0.5, whole_step=True)
    _, metrics = stepped(examples, aot, micro_tokens=100_000)
    assert math.isfinite(metrics["loss"])
    with pytest.raises(TrainError, match=r"sorts all 8 pairs of a step.*raise micro_tokens"):
        stepped(examples, aot, micro_tokens=60)
    with pytest.raises(TrainError, match="'weight'"):
        stepped(make_examples(8, num_sequences=2), aot, micro_tokens=100_000)
    with pytest.raises(ConfigError, match="sorts"):
        train.preference_objective(objectives.orpo_losses, beta=1.0, whole_step=True, pair_weights="wpo")


# What is refused


def test_what_is_no_pair_is_refused(stepped, make_examples) -> None:
    singles, pairs = make_examples(3), make_examples(3, num_sequences=2)
    with pytest.raises(TrainError, match="has 1 sequences"):
        stepped(singles, ORDINARY["dpo"])
    with pytest.raises(TrainError, match="example 'example-2' has 1 sequences"):
        stepped([*pairs[:2], singles[2]], ORDINARY["dpo"])
    three = Example(id="three", sequences=(*singles[0].sequences, *pairs[0].sequences), scalars=singles[0].scalars)
    with pytest.raises(TrainError, match="'three' has 3 sequences"):
        stepped([*pairs[:2], three], ORDINARY["dpo"])
    with pytest.raises(TrainError, match=r"one sequence; .* has 2"):
        stepped(pairs, ORDINARY["kto"])


def test_an_empty_side_is_refused(stepped, make_examples) -> None:
    good, bad = make_examples(2, num_sequences=2)
    chosen, rejected = bad.sequences
    emptied = bad.replace(sequences=(chosen, rejected.replace(mask=(False,) * len(rejected.mask))))
    with pytest.raises(TrainError, match=r"example 'example-1' \(rejected\) has no token to compare by"):
        stepped([good, emptied], ORDINARY["dpo"])
    masked = rejected.replace(columns={**rejected.columns, "margin_weights": (0.0,) * len(rejected.mask)})
    weighted = chosen.replace(columns={**chosen.columns, "margin_weights": (1.0,) * len(chosen.mask)})
    with pytest.raises(TrainError, match="wholly masked"):
        stepped([bad.replace(sequences=(weighted, masked))], ORDINARY["dpo"])


def test_a_logprob_that_is_no_number_is_refused(make_model, make_examples) -> None:
    model = make_model()
    with torch.no_grad():
        model.embed.weight[3] = math.nan
    trainer = train.Trainer(model, train.TrainConfig(), ORDINARY["dpo"])
    with pytest.raises(TrainError, match="logprob nan"):
        trainer.step(make_examples(4, num_sequences=2))


def test_what_is_missing_is_named(stepped, make_examples) -> None:
    plain = [each.replace(scalars={}) for each in make_examples(3, num_sequences=2)]
    bare = [
        each.replace(sequences=tuple(sequence.replace(columns={}) for sequence in each.sequences)) for each in plain
    ]
    with pytest.raises(TrainError, match="column 'ref_logprobs'"):
        stepped(bare, ORDINARY["dpo"])
    with pytest.raises(TrainError, match="scalar 'step_nll_tokens'"):
        stepped(plain, ORDINARY["cpo"])
    labelled = [each.replace(scalars={"label": 1.0}) for each in make_examples(3)]
    with pytest.raises(TrainError, match="scalar 'kl'"):
        stepped(labelled, ORDINARY["kto"])
