"""Prefixes that examples share: which are found, how they are packed, and that no number changes but by rounding."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from posttrain import models, objectives, train
from posttrain.core import Example, TokenSequence
from posttrain.train import trainer as trainer_module
from posttrain.train.prefixes import Unit, common_prefix, layout_of, micros_of, units_of
from posttrain.train.rows import to_rows

SHAPE = {"head_dim": 32, "max_positions": 256}


@pytest.fixture
def make_trainer(make_model):
    """A function that makes a trainer whose model can share prefixes, where the processor has bf16 products."""
    if not models.shares_prefixes(make_model(**SHAPE), torch.device("cpu"), torch.bfloat16):
        pytest.skip("no bf16 products on this processor")

    def make(objective=train.nll_objective, *, dtype="bfloat16", forward=train.token_forward, **settings):
        config = train.TrainConfig(lr=1e-2, dtype=dtype, max_grad_norm=0.0, **settings)
        return train.Trainer(make_model(**SHAPE), config, objective, forward=forward)

    return make


def example(name: str, *sequences: list[int], prompt: int, group: str = "", columns=None) -> Example:
    made = tuple(
        TokenSequence(
            tokens=tuple(tokens),
            mask=tuple(place >= prompt for place in range(len(tokens))),
            columns={key: tuple(value for _ in tokens) for key, value in (columns or {}).items()},
        )
        for tokens in sequences
    )
    return Example(id=name, group=group, sequences=made)


def siblings(num: int, *, prompt: int = 30, group: str = "a", seed: int = 0, columns=None) -> list[Example]:
    """Answers of different lengths to one prompt."""
    draw = np.random.default_rng(seed)
    question = draw.integers(1, 48, prompt).tolist()
    return [
        example(
            f"{group}{index}",
            question + draw.integers(1, 48, 5 + 3 * index).tolist(),
            prompt=prompt,
            group=group,
            columns=columns,
        )
        for index in range(num)
    ]


def apart(examples: list[Example]) -> list[Example]:
    """The same without groups: nothing is shared."""
    return [one.replace(group="") for one in examples]


def test_a_common_prefix_leaves_something_of_each() -> None:
    arrays = [np.array(tokens) for tokens in ([1, 2, 3, 4], [1, 2, 9], [1, 2, 3])]
    assert common_prefix(arrays) == 2
    assert common_prefix([np.array([5, 6, 7]), np.array([5, 6, 7])]) == 2
    assert common_prefix(arrays[:1]) == 0


def test_siblings_are_a_unit_as_far_as_they_fit() -> None:
    rows = to_rows([*siblings(3), example("other", list(range(1, 20)), prompt=4)])
    assert units_of(rows, 1000) == [Unit((0, 1, 2), 30, 30 + 5 + 8 + 11), Unit((3,), 0, 19)]
    # 30 + 5 + 8 = 43 fit into 45, the third needs the prefix again, and by itself shares it with nobody
    assert units_of(rows, 45)[:2] == [Unit((0, 1), 30, 43), Unit((2,), 0, 41)]


def test_short_prefixes_are_not_worth_it() -> None:
    rows = to_rows(siblings(3, prompt=6))
    assert all(unit.prefix == 0 for unit in units_of(rows, 1000))


def test_micro_batches_hold_every_example_once_and_count_prefixes_once() -> None:
    examples = [*siblings(5), *siblings(4, group="b", seed=1), example("c", list(range(1, 40)), prompt=3)]
    rows = to_rows(examples)
    micros = micros_of(rows, 90, shared=True)
    assert sorted(index for micro in micros for index in micro.members) == list(range(len(rows)))
    for micro in micros:
        row = layout_of(micro, rows)
        assert len(row.kept_M) == sum(unit.num_tokens for unit in micro.units) <= 90
        assert len(row.place_N) == sum(rows[index].num_tokens for index in micro.members)
    assert sum(len(layout_of(micro, rows).kept_M) for micro in micros) < sum(row.num_tokens for row in rows)


@pytest.mark.parametrize("micro_tokens", [60, 4096])
def test_a_shared_step_is_the_step(make_trainer, micro_tokens: int) -> None:
    columns = {"advantages": 0.7, "old_logprobs": -3.5}
    examples = [*siblings(4, columns=columns), *siblings(3, group="b", seed=5, prompt=17, columns=columns)]
    objective = train.policy_objective()
    exact = make_trainer(objective, dtype="float32", micro_tokens=4096).step(apart(examples))
    alone = make_trainer(objective, micro_tokens=micro_tokens).step(apart(examples))
    together = make_trainer(objective, micro_tokens=micro_tokens).step(examples)
    assert together["num_tokens"] == alone["num_tokens"]
    assert together["num_micro_batches"] <= alone["num_micro_batches"]
    for name in ("loss", "grad_norm"):
        assert together[name] == pytest.approx(exact[name], rel=2e-2)
        assert together[name] == pytest.approx(alone[name], rel=2e-2)


def test_a_pair_shares_its_prompt(make_trainer) -> None:
    prompt = [7, 3, 9, 11, 2, 5, 8, 1, 4, 6, 10]
    pair = example("pair", [*prompt, 12, 13, 14], [*prompt, 15, 16], prompt=len(prompt), columns={"ref_logprobs": -3.0})
    (unit,) = units_of(to_rows([pair]), 100)
    assert unit == Unit((0,), 11, 11 + 3 + 2)
    objective = train.preference_objective(partial(objectives.dpo_losses, beta=0.5), beta=0.5)
    exact = make_trainer(objective, dtype="float32").step([pair])
    shared = make_trainer(objective).step([pair])
    assert shared["loss"] == pytest.approx(exact["loss"], rel=2e-2)
    assert shared["grad_norm"] == pytest.approx(exact["grad_norm"], rel=3e-2)


def test_logprobs_go_back_to_their_examples(make_trainer) -> None:
    examples = [*siblings(2), *siblings(3, group="b", seed=2)]
    mixed = [examples[index] for index in (3, 0, 4, 1, 2)]
    exact = make_trainer(dtype="float32").logprobs(mixed)
    found = make_trainer(micro_tokens=64).logprobs(mixed)
    for one, other, source in zip(exact, found, mixed, strict=True):
        assert len(other[0]) == len(source.sequences[0].tokens)
        assert np.allclose(one[0], other[0], atol=5e-2)
        assert all(value == 0 for value, target in zip(other[0], source.sequences[0].mask, strict=True) if not target)


def test_logprobs_before_a_step_are_those_of_the_step(make_trainer) -> None:
    examples = siblings(4)
    trainer = make_trainer(train.policy_objective())
    known = trainer.logprobs(examples)
    with_old = [
        one.replace(sequences=(one.sequences[0].replace(columns={"advantages": old, "old_logprobs": old}),))
        for one, (old,) in zip(examples, known, strict=True)
    ]
    metrics = trainer.step(with_old)
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["ratio/max"] == metrics["ratio/min"] == 1 if "ratio/max" in metrics else True


def test_without_the_c_the_step_is_the_same_up_to_rounding(make_trainer, monkeypatch) -> None:
    examples = siblings(4)
    fast = make_trainer().step(examples)
    monkeypatch.setattr(trainer_module, "shares_prefixes", lambda *rest: False)
    monkeypatch.setattr(train.forward, "shares_prefixes", lambda *rest: False)
    plain = make_trainer().step(examples)
    for name in ("loss", "grad_norm"):
        assert fast[name] == pytest.approx(plain[name], rel=2e-2)


def test_sharing_resumes_to_the_same_bits(make_trainer) -> None:
    steps = [siblings(3, seed=seed) for seed in range(4)]
    whole = make_trainer()
    for examples in steps:
        whole.step(examples)
    first = make_trainer()
    for examples in steps[:2]:
        first.step(examples)
    second = make_trainer()
    second.restore(first.state())
    for examples in steps[2:]:
        second.step(examples)
    assert all(
        torch.equal(one, two) for one, two in zip(whole.model.parameters(), second.model.parameters(), strict=True)
    )


def test_noise_is_drawn_for_every_sequence(make_trainer) -> None:
    seen = []

    def forward(model, batch, row):
        seen.append((len(row.tokens_N), len(row.shared.kept_M)))
        return train.token_forward(model, batch, row)

    make_trainer(forward=train.noisy_embeddings(forward, 5.0)).step(siblings(3))
    ((num_tokens, computed),) = seen
    assert computed == num_tokens


def test_a_scalar_head_reads_shared_states(make_model, make_trainer) -> None:
    examples = [one.replace(sequences=one.sequences) for one in siblings(3)]
    found = []
    for dtype in ("float32", "bfloat16"):
        critic = models.ScoredDecoder(make_model(**SHAPE), seed=1)
        config = train.TrainConfig(dtype=dtype)
        judge = train.Trainer(critic, config, train.nll_objective, forward=train.value_forward)
        found.append(judge.logprobs(examples))
    for exact, other in zip(*found, strict=True):
        assert np.allclose(exact[0], other[0], atol=5e-2)
        assert any(value != 0 for value in exact[0])
