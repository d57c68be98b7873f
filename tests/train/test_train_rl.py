"""The policy and value objectives through the trainer: accumulated is one batch, masks, what is missing is named."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from posttrain import objectives, train
from posttrain.core import ConfigError, TrainError
from posttrain.models import ScoredDecoder

OBJECTIVES: dict[str, dict[str, Any]] = {
    "gspo": {"ratio": "sequence", "normalise": "sequence", "kl_coef": 0.1},
    "gspo token": {"ratio": "sequence_token", "normalise": "sequence"},
    "one action": {"ratio": "sequence_product", "normalise": "sequence"},
    "sum per sequence": {"normalise": "sequence_sum"},
    "groups": {"normalise": "group", "kl_coef": 0.1, "kl_unbiased": True},
    "cispo": {"surrogate": partial(objectives.cispo_surrogate, clip_high=0.2), "kl_coef": 0.1},
    "sapo": {"surrogate": objectives.sapo_surrogate},
    "vespo": {"surrogate": objectives.vespo_surrogate, "importance_cap": 2.0},
    "icepop": {"importance_low": 0.8, "importance_cap": 1.25, "importance_bound": "mask"},
    "masked sequences": {"importance_cap": 1.5, "importance_bound": "mask", "importance_level": "geometric"},
    "stale": {"stale_threshold": 0.02},
    "entropy": {"entropy_coef": 0.1},
}


@pytest.fixture
def stepped(make_model, before_update):
    """A function that takes one step and gives the gradients by name, and the metrics."""

    def run(examples, options, micro_tokens, **config):
        model = make_model()
        settings = train.TrainConfig(max_grad_norm=0, micro_tokens=micro_tokens, entropy=True, **config)
        trainer = train.Trainer(model, settings, train.policy_objective(**options))
        grads = {}
        before_update(
            trainer, lambda: grads.update({name: weight.grad.clone() for name, weight in model.named_parameters()})
        )
        return grads, trainer.step(examples)

    return run


@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulated_is_one_batch(stepped, make_examples, name):
    examples = make_examples(10, group_size=4)
    whole, whole_metrics = stepped(examples, OBJECTIVES[name], 100_000)
    parts, metrics = stepped(examples, OBJECTIVES[name], 40)
    assert whole_metrics["num_micro_batches"] == 1
    assert metrics["num_micro_batches"] > 3
    assert whole_metrics["grad_norm"] > 0
    for weight, grad in whole.items():
        torch.testing.assert_close(parts[weight], grad, rtol=1e-3, atol=2e-6, msg=f"{name} {weight}")
    for key in whole_metrics.keys() - train.TIMING_METRICS - {"num_micro_batches"}:
        assert metrics[key] == pytest.approx(whole_metrics[key], rel=1e-4, abs=1e-5), key


def test_policy_weights_mask_the_surrogate_but_not_the_kl(stepped, make_examples):
    examples = make_examples(4)

    def weighted(weight: float):
        return [
            example.replace(
                sequences=tuple(
                    sequence.replace(columns={**sequence.columns, "policy_weights": (weight,) * len(sequence.tokens)})
                    for sequence in example.sequences
                )
            )
            for example in examples
        ]

    plain, _ = stepped(examples, {}, 1000)
    same, metrics = stepped(weighted(1.0), {}, 1000)
    assert metrics["sampling/kept"] == 1.0
    for name, grad in plain.items():
        assert torch.equal(same[name], grad), name
    nothing, metrics = stepped(weighted(0.0), {}, 1000)
    assert metrics["grad_norm"] == 0.0
    assert metrics["sampling/kept"] == 0.0
    assert all(not grad.any() for grad in nothing.values())
    _, metrics = stepped(weighted(0.0), {"kl_coef": 0.1}, 1000)
    assert metrics["grad_norm"] > 0.0


def test_the_entropy_bonus_raises_the_entropy(make_model, make_examples):
    examples = [
        example.replace(
            sequences=tuple(
                sequence.replace(columns={**sequence.columns, "advantages": (0.0,) * len(sequence.tokens)})
                for sequence in example.sequences
            )
        )
        for example in make_examples(6)
    ]
    found = {}
    for coef in (1.0, -1.0):
        config = train.TrainConfig(lr=1e-2, entropy=True)
        trainer = train.Trainer(make_model(), config, train.policy_objective(entropy_coef=coef))
        found[coef] = [trainer.step(examples)["entropy"] for _ in range(6)]
    assert found[1.0][-1] > found[1.0][0] > found[-1.0][-1]


def test_what_is_missing_is_named(make_model, make_examples):
    examples = make_examples(2)
    trainer = train.Trainer(make_model(), train.TrainConfig(), train.policy_objective(entropy_coef=0.1))
    with pytest.raises(TrainError, match=r"TrainConfig\.entropy"):
        trainer.step(examples)
    without = [
        example.replace(
            sequences=tuple(
                sequence.replace(columns={"advantages": sequence.columns["advantages"]})
                for sequence in example.sequences
            )
        )
        for example in examples
    ]
    trainer = train.Trainer(make_model(), train.TrainConfig(), train.policy_objective(importance_low=0.5))
    with pytest.raises(TrainError, match="sampler_logprobs"):
        trainer.step(without)
    with pytest.raises(ConfigError, match="needs max_length"):
        train.policy_objective(normalise="constant")
    critic = train.Trainer(
        ScoredDecoder(make_model()), train.TrainConfig(), train.value_objective(), forward=train.value_forward
    )
    with pytest.raises(TrainError, match="'returns'"):
        critic.step(without)


# The value model


def with_returns(examples, critic):
    """Returns that depend on the token before, and the values as they are."""
    return [
        example.replace(
            sequences=tuple(
                sequence.replace(
                    columns={
                        "old_values": column,
                        "returns": (0.0, *(float(token % 2) for token in sequence.tokens[:-1])),
                    }
                )
                for sequence, column in zip(example.sequences, columns, strict=True)
            )
        )
        for example, columns in zip(examples, critic.logprobs(examples), strict=True)
    ]


def test_values_are_of_the_state_before_the_token(make_model, make_examples):
    model = ScoredDecoder(make_model(), seed=3)
    trainer = train.Trainer(model, train.TrainConfig(), train.value_objective(), forward=train.value_forward)
    (example,) = make_examples(1)
    (sequence,) = example.sequences
    ((column,),) = trainer.logprobs([example])
    values_T = model(torch.tensor([sequence.tokens]))[0]
    for position, target in enumerate(sequence.mask):
        expected = values_T[position - 1].item() if target else 0.0
        assert column[position] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_value_steps_accumulate_exactly_and_learn(make_model, make_examples, before_update, normalise):
    grads = {}
    for micro_tokens in (100_000, 40):
        model = ScoredDecoder(make_model(), zero=True)
        config = train.TrainConfig(lr=1e-2, max_grad_norm=0, micro_tokens=micro_tokens)
        objective = train.value_objective(clip=0.5, normalise=normalise)
        trainer = train.Trainer(model, config, objective, forward=train.value_forward)
        examples = with_returns(make_examples(10), trainer)

        def look(model=model, micro_tokens=micro_tokens):
            grads.setdefault(
                micro_tokens, {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
            )

        before_update(trainer, look)
        errors = []
        for _ in range(15):
            errors.append(trainer.step(examples)["val/error"])
            examples = with_returns(examples, trainer)
        assert errors[-1] < 0.7 * errors[0]
    whole, parts = grads[100_000], grads[40]
    assert whole.keys() == parts.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-3, atol=2e-6, msg=name)


def test_a_value_beyond_the_clip_stands_still(make_model, make_examples):
    """All values have already moved past the clip towards their returns: nothing pulls."""
    model = ScoredDecoder(make_model(), zero=True)
    trainer = train.Trainer(
        model, train.TrainConfig(lr=0.1), train.value_objective(clip=0.2), forward=train.value_forward
    )
    examples = [
        example.replace(
            sequences=tuple(
                sequence.replace(
                    columns={"old_values": (-1.0,) * len(sequence.tokens), "returns": (5.0,) * len(sequence.tokens)}
                )
                for sequence in example.sequences
            )
        )
        for example in make_examples(3)
    ]
    metrics = trainer.step(examples)
    assert metrics["val/clipfrac_avg"] == 1.0
    assert metrics["grad_norm"] == 0.0
