"""What a step does to the weights, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain import models, train
from posttrain.core import ConfigError, Example, TokenSequence, TrainError


def example(tokens=(1, 2, 3), mask=(False, True, True), columns=None, **fields):
    sequence = TokenSequence(tokens=tokens, mask=mask, columns=columns or {})
    return Example(**{"id": "bad-one", "sequences": (sequence,), **fields})


def trainer_of(model, objective=train.nll_objective, **settings):
    return train.Trainer(model, train.TrainConfig(**settings), objective)


def snapshot(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def unchanged(model, before):
    return all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (example(mask=(True, True, True)), r"'bad-one'.*mask\[0\] is True"),
        (example(mask=(False, True)), r"'bad-one'.*mask has 2 entries for 3 tokens"),
        (example(columns={"advantages": (0.0, 1.0)}), r"'bad-one'.*'advantages' has 2 values for 3 tokens"),
        (example(columns={"advantages": (0.0, math.nan, 1.0)}), r"'bad-one'.*'advantages' is nan at position 1"),
        (example(columns={"old_logprobs": (0.0, 0.0, -math.inf)}), r"'bad-one'.*'old_logprobs' is -inf at position 2"),
        (example(scalars={"margin": math.inf}), r"'bad-one'.*'margin' is inf"),
        (example(tokens=(1, 99, 3)), r"'bad-one'.*token id 99 is outside.*48"),
        (example(tokens=(1, -1, 3)), r"'bad-one'.*token id -1"),
        (example(tokens=(1,) * 65, mask=(False,) * 65), r"'bad-one' has 65 tokens, but the model has 64 positions"),
        (example(tokens=(), mask=()), r"'bad-one' has no tokens"),
        (example(sequences=()), r"'bad-one' has no sequences"),
        (example(mask=(False, False, False)), r"step 1: none of its 1 examples has a target"),
    ],
)
def test_malformed_examples_are_named(make_model, bad, message):
    model = make_model()
    before = snapshot(model)
    trainer = trainer_of(model)
    with pytest.raises(TrainError, match=message):
        trainer.step([bad])
    assert unchanged(model, before)
    assert trainer.num_steps == 0


def test_unlike_columns_and_scalars_are_named(make_model):
    good = example(id="good-one", columns={"advantages": (0.0, 1.0, 1.0)})
    with pytest.raises(TrainError, match=r"'bad-one' lacks the column 'advantages'"):
        trainer_of(make_model()).step([good, example()])
    with pytest.raises(TrainError, match=r"'bad-one' lacks the scalar 'weight'"):
        trainer_of(make_model()).step([example(id="good-one", scalars={"weight": 1.0}), example()])


def test_the_second_sequence_of_a_pair_is_named(make_model):
    good = TokenSequence(tokens=(1, 2), mask=(False, True))
    bad = TokenSequence(tokens=(1, 2), mask=(True, True))
    with pytest.raises(TrainError, match="'bad-one', sequence 1"):
        trainer_of(make_model()).step([example(sequences=(good, bad))])


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("micro_tokens", [1, 1000])
def test_not_finite_is_stopped_before_the_weights_and_named(make_model, make_examples, kind, micro_tokens):
    def objective(stats, batch):
        loss, metrics = train.nll_objective(stats, batch)
        poisoned_E = batch.scalars["weight"] > 100
        poison = stats.logprobs_N[poisoned_E[batch.example_P]].sum()
        if kind == "loss":
            return loss + poison * torch.where(poisoned_E.any(), math.nan, 0.0), metrics
        return loss + (poison - poison.detach()).abs().sqrt() * poisoned_E.any(), metrics  # value 0, slope infinite

    examples = make_examples(6)
    model = make_model()
    trainer = trainer_of(model, objective, micro_tokens=micro_tokens)
    trainer.step(examples)
    before = snapshot(model)
    poisoned = [one.replace(scalars={"weight": 1000.0}) if one.id == "example-3" else one for one in examples]
    with pytest.raises(TrainError, match=r"step 2: .*nan.*caused by examples example-3\. "):
        trainer.step(poisoned)
    assert unchanged(model, before)
    assert trainer.num_steps == 1
    reference = trainer_of(make_model(), objective, micro_tokens=micro_tokens)
    reference.step(examples)
    assert trainer.step(examples)["loss"] == reference.step(examples)["loss"]  # it goes on as if nothing had happened


def test_broken_weights_are_told_apart_from_broken_examples(make_model, make_examples):
    model = make_model()
    with torch.no_grad():
        model.final_norm.weight.fill_(math.nan)
    with pytest.raises(TrainError, match=r"step 1.*example-0"):
        trainer_of(model).step(make_examples(3))


def test_adamw_against_the_formula(make_model, make_examples, before_update):
    """Two steps of AdamW written out: bias-corrected moments, decoupled decay, clipping."""
    lr, (beta1, beta2), eps, decay, limit = 0.01, (0.9, 0.99), 1e-8, 0.1, 0.5
    model = make_model(tie_embeddings=True)
    grads = []
    trainer = trainer_of(model, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay, max_grad_norm=limit)
    expected = snapshot(model)
    moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in expected.items()}
    before_update(
        trainer, lambda: grads.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    )
    for step in (1, 2):
        metrics = trainer.step(make_examples(4, seed=step))
        norm = math.sqrt(sum(grad.square().sum().item() for grad in grads[-1].values()))
        assert norm == pytest.approx(min(limit, metrics["grad_norm"]), rel=1e-4)
        for name, weight in expected.items():
            grad, (first, second) = grads[-1][name], moments[name]
            first.mul_(beta1).add_(grad, alpha=1 - beta1)
            second.mul_(beta2).add_(grad * grad, alpha=1 - beta2)
            if weight.ndim >= 2 and "embed" not in name:
                weight.mul_(1 - lr * decay)
            update = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
            weight.sub_(lr * update)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_schedules_by_hand():
    linear = train.TrainConfig(lr=1.0, schedule="linear", warmup=2, total_steps=6)
    assert [linear.lr_at(step) for step in range(8)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    cosine = train.TrainConfig(lr=2.0, schedule="cosine", total_steps=4)
    assert [cosine.lr_at(step) for step in range(5)] == pytest.approx(
        [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0]
    )
    constant = train.TrainConfig(lr=3.0, warmup=0.5, total_steps=4)
    assert constant.warmup_steps == 2
    assert [constant.lr_at(step) for step in (0, 1, 2, 99)] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    with pytest.raises(ConfigError, match="total_steps"):
        train.TrainConfig(schedule="linear")
    with pytest.raises(ConfigError, match="betas"):
        train.TrainConfig(betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match="needs max_length"):
        train.policy_objective(normalise="constant")


def test_the_learning_rate_reaches_the_optimiser(make_model, make_examples):
    trainer = trainer_of(make_model(), lr=0.1, schedule="linear", total_steps=2)
    assert [trainer.step(make_examples(2))["lr"] for _ in range(2)] == pytest.approx([0.1, 0.05])
    before = snapshot(trainer.model)
    assert trainer.step(make_examples(2))["lr"] == 0.0
    assert unchanged(trainer.model, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns(make_model, make_examples, dtype):
    model = make_model()
    trainer = trainer_of(model, lr=0.01, dtype=dtype, micro_tokens=64, entropy=True)
    examples = make_examples(4)
    before = trainer.evaluate(examples)
    for _ in range(30):
        metrics = trainer.step(examples)
    after = trainer.evaluate(examples)
    assert before["nll"] == pytest.approx(math.log(48), rel=0.2)
    assert after["nll"] < before["nll"] / 3
    assert after["perplexity"] == pytest.approx(math.exp(after["nll"]))
    assert metrics["entropy"] > 0
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert metrics["num_tokens"] == 30 * sum(one.num_tokens() for one in examples)


def test_bfloat16_gradients_are_close_to_float32(make_model, make_examples):
    losses = [
        trainer_of(make_model(), dtype=dtype).step(make_examples(16))["loss"] for dtype in ("float32", "bfloat16")
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_frozen_weights_stay_and_nothing_to_learn_is_refused(make_model, make_examples):
    model = make_model()
    for name, weight in model.named_parameters():
        weight.requires_grad_("mlp" in name)
    before = snapshot(model)
    trainer_of(model, lr=0.1).step(make_examples(4))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == (not weight.requires_grad), name
    model.requires_grad_(False)
    with pytest.raises(TrainError, match="no parameter"):
        trainer_of(model)


def test_steps_are_reproducible(make_model, make_examples):
    runs = []
    for _ in range(2):
        trainer = trainer_of(make_model(), micro_tokens=50, dtype="bfloat16")
        metrics = [trainer.step(make_examples(10, seed=seed)) for seed in range(3)]
        for row in metrics:
            for name in train.TIMING_METRICS:
                assert row.pop(name) > 0
        runs.append((metrics, snapshot(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], weight) for name, weight in runs[1][1].items())


def test_a_step_leaves_the_global_random_state_alone(make_model, make_examples):
    torch.manual_seed(5)
    trainer_of(make_model()).step(make_examples(2))
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)


def test_randomness_in_the_model_depends_on_seed_and_step_only(make_model, make_examples):
    def noisy(stats, batch):
        loss, metrics = train.nll_objective(stats, batch)
        return loss * (1 + torch.rand(())), metrics

    def losses(seed, skip):
        trainer = trainer_of(make_model(), noisy, lr=0.0, seed=seed)
        trainer.num_steps = skip
        return [trainer.step(make_examples(2))["loss"] for _ in range(3 - skip)]

    assert losses(1, 0)[1:] == losses(1, 1)
    assert losses(1, 0) != losses(2, 0)
    assert len(set(losses(1, 0))) == 3


def test_the_entropy_of_evaluate_is_the_model_s(make_model, make_examples):
    model = make_model()
    examples = make_examples(3)
    result = trainer_of(model, temperature=0.5).evaluate(examples)
    entropies, nlls = [], []
    with torch.no_grad():
        for one in examples:
            sequence = one.sequences[0]
            logprobs_TV = model(torch.tensor([sequence.tokens]))[0].log_softmax(-1)
            for position in [index for index, target in enumerate(sequence.mask) if target]:
                row = logprobs_TV[position - 1]
                entropies.append(-(row.exp() * row).sum().item())
                nlls.append(-row[sequence.tokens[position]].item())
    assert result["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert result["nll"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)
    with pytest.raises(TrainError, match="none of the 1 examples"):
        trainer_of(model).evaluate([example(mask=(False, False, False))])


def test_the_model_a_sampler_shares_is_the_one_trained(make_model, make_examples):
    model = make_model()
    assert isinstance(trainer_of(model).model, models.Decoder)
    assert trainer_of(model).model is model


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "olmo2"])
def test_rows_longer_than_the_positions_of_one_sequence(make_model, make_examples, family):
    shape = {
        "gpt2": {"positions": "learned", "norm": "layer", "gated_mlp": False, "num_kv_heads": 4},
        "qwen3": {"qk_norm": "head"},
        "olmo2": {"qk_norm": "all", "norm_placement": "post"},
    }[family]
    examples = make_examples(12)
    losses = [
        trainer_of(make_model(family=family, **shape), micro_tokens=tokens).step(examples)["loss"]
        for tokens in (32, 1000)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
