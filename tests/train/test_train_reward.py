"""Reward models through the trainer: whatever the layout, one gradient; and what is wrong with an example is named."""

from __future__ import annotations

import random

import pytest
import torch

from posttrain import objectives, train
from posttrain.core import ConfigError, Example, TokenSequence, TrainError
from posttrain.models import ScoredDecoder

VOCAB = 48


def answer(rng: random.Random, columns: dict[str, float] | None = None) -> TokenSequence:
    length = rng.randint(3, 20)
    last = length - 1
    return TokenSequence(
        tokens=tuple(rng.randrange(VOCAB) for _ in range(length)),
        mask=tuple(index == last for index in range(length)),
        columns={name: (0.0,) * last + (value,) for name, value in (columns or {}).items()},
    )


def ranked(count: int, *, seed: int = 0, longest: int = 2, levels: bool = False) -> list[Example]:
    rng = random.Random(seed)
    found = []
    for index in range(count):
        num = 2 if longest == 2 else rng.randint(2, longest)
        sequences = tuple(answer(rng, {"levels": 0.3 * (num - place)} if levels else None) for place in range(num))
        found.append(Example(id=f"list-{index}", sequences=sequences, scalars={"weight": rng.uniform(0.5, 2.0)}))
    return found


def stepwise(count: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    found = []
    for index in range(count):
        length = rng.randint(6, 20)
        ends = sorted(rng.sample(range(1, length), 3))
        labels = [0.0] * length
        for place, end in enumerate(ends):
            labels[end] = float(rng.random() < 0.8 - 0.3 * place)
        sequence = TokenSequence(
            tokens=tuple(rng.randrange(VOCAB) for _ in range(length)),
            mask=tuple(place in ends for place in range(length)),
            columns={"labels": tuple(labels)},
        )
        found.append(Example(id=f"steps-{index}", sequences=(sequence,), group=f"prompt-{index // 2}"))
    return found


CASES = {
    "pairs": (ranked(12), train.reward_objective(center=0.01, label_smoothing=0.1)),
    "margins": (ranked(12, levels=True), train.reward_objective(center=0.01)),
    "lists": (ranked(12, longest=4, levels=True), train.reward_objective(center=0.01)),
    "plackett-luce": (ranked(12, longest=4), train.reward_objective(ranking="plackett_luce", center=0.01)),
    "process-steps": (stepwise(10), train.process_objective(positive_weight=0.5)),
    "process-answers": (stepwise(10), train.process_objective(normalise="sequence")),
    "process-prompts": (stepwise(10), train.process_objective(normalise="group")),
    "outcome": (
        [
            Example(id=f"answer-{i}", sequences=(answer(random.Random(i), {"labels": float(i % 3 == 0)}),))
            for i in range(12)
        ],
        train.outcome_objective(),
    ),
}


@pytest.fixture
def make_scored(make_model):
    """A function that makes the same tiny reward model each time."""
    return lambda **changes: ScoredDecoder(make_model(**changes), seed=3)


@pytest.fixture
def stepped(make_scored, before_update):
    """A function that takes one step and gives the gradient and the metrics."""

    def take(examples, objective, **settings):
        model = make_scored()
        trainer = train.Trainer(
            model, train.TrainConfig(max_grad_norm=0, **settings), objective, forward=train.score_forward
        )
        grads = {}

        def look():
            grads.update(
                {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
            )

        before_update(trainer, look)
        return grads, trainer.step(examples)

    return take


def same(first, second, rtol=1e-5):
    scale = max(grad.abs().max().item() for grad in first.values())
    for name, grad in first.items():
        torch.testing.assert_close(second[name], grad, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_accumulated_is_one_batch(stepped, name):
    examples, objective = CASES[name]
    whole, whole_metrics = stepped(examples, objective, micro_tokens=100_000)
    parts, metrics = stepped(examples, objective, micro_tokens=40)
    assert whole_metrics["num_micro_batches"] == 1
    assert metrics["num_micro_batches"] > 3
    same(whole, parts)
    for key in whole_metrics.keys() - train.TIMING_METRICS - {"num_micro_batches"}:
        assert metrics[key] == pytest.approx(whole_metrics[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", CASES)
def test_what_follows_the_judged_token_does_not_count(stepped, name):
    examples, objective = CASES[name]

    def longer(sequence: TokenSequence) -> TokenSequence:
        columns = {key: (*values, 9.0, 9.0) for key, values in sequence.columns.items()}
        return sequence.replace(tokens=(*sequence.tokens, 1, 2), mask=(*sequence.mask, False, False), columns=columns)

    padded = [example.replace(sequences=tuple(map(longer, example.sequences))) for example in examples]
    first, _ = stepped(examples, objective)
    second, _ = stepped(padded, objective)
    same(first, second)


def test_packed_is_padded(stepped, make_scored):
    """Against a padded batch through the model's plain forward, written out here."""
    examples = ranked(6, levels=True)
    packed, metrics = stepped(examples, train.reward_objective(center=0.02), micro_tokens=100_000)
    model = make_scored()
    sides = []
    for place in (0, 1):
        sequences = [example.sequences[place] for example in examples]
        longest = max(len(sequence.tokens) for sequence in sequences)
        tokens_BT = torch.tensor([[*s.tokens, *([7] * (longest - len(s.tokens)))] for s in sequences])
        ends_B = torch.tensor([len(s.tokens) - 1 for s in sequences])
        sides.append(model(tokens_BT)[torch.arange(len(sequences)), ends_B])
    losses_B = -torch.nn.functional.logsigmoid(sides[0] - sides[1] - 0.3) + 0.02 * (sides[0] + sides[1]) ** 2
    weights_B = torch.tensor([example.scalars["weight"] for example in examples])
    loss = (losses_B * weights_B).mean()
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    same({name: w.grad for name, w in model.named_parameters() if w.requires_grad}, packed)


def test_the_output_head_is_left_alone(make_model):
    model = ScoredDecoder(make_model(tie_embeddings=False))
    before = model.decoder.head.weight.clone()
    trainer = train.Trainer(model, train.TrainConfig(lr=0.1), train.reward_objective(), forward=train.score_forward)
    trainer.step(ranked(4))
    assert torch.equal(model.decoder.head.weight, before)


def test_it_learns_which_token_is_good(make_scored):
    rng = random.Random(0)

    def pair(index: int) -> Example:
        prompt = tuple(rng.randrange(2, VOCAB) for _ in range(4))
        sides = []
        for last in (0, 1):
            tokens = (*prompt, last)
            sides.append(TokenSequence(tokens=tokens, mask=(False,) * 4 + (True,)))
        return Example(id=f"pair-{index}", sequences=tuple(sides))

    trainer = train.Trainer(
        make_scored(), train.TrainConfig(lr=1e-2), train.reward_objective(), forward=train.score_forward
    )
    for step in range(20):
        metrics = trainer.step([pair(16 * step + index) for index in range(16)])
    assert metrics["accuracy"] == 1.0
    scores = trainer.logprobs([pair(1000)])[0]
    assert scores[0][-1] > scores[1][-1]
    assert scores[0][:-1] == (0.0,) * 4


def test_malformed_examples_are_named(make_scored):
    rng = random.Random(0)
    trainer = train.Trainer(make_scored(), train.TrainConfig(), train.reward_objective(), forward=train.score_forward)
    whole = answer(rng)
    several = whole.replace(mask=(False, *(True,) * (len(whole.tokens) - 1)))
    with pytest.raises(TrainError, match=r"'odd': an answer has \d+ targets; a reward model judges each answer at one"):
        trainer.step([*ranked(2, seed=1), Example(id="odd", sequences=(whole, several), scalars={"weight": 1.0})])
    with pytest.raises(TrainError, match="'alone' has one answer"):
        trainer.step([Example(id="alone", sequences=(whole,))])
    other = train.Trainer(
        make_scored(), train.TrainConfig(), train.reward_objective(ranking="plackett_luce"), forward=train.score_forward
    )
    with pytest.raises(TrainError, match="knows no margins"):
        other.step(ranked(2, levels=True))
    with pytest.raises(TrainError, match="needs the column 'labels'"):
        train.Trainer(make_scored(), train.TrainConfig(), train.process_objective(), forward=train.score_forward).step(
            ranked(2)
        )
    with pytest.raises(ConfigError, match="label smoothing is of pairs"):
        train.reward_objective(ranking="plackett_luce", label_smoothing=0.1)
    with pytest.raises(ConfigError, match="normalise must be"):
        train.process_objective(normalise="constant")


def test_pair_losses_average_over_lists():
    """Three answers weigh as much as two: the mean over lists of the mean over their pairs."""
    scores_S, list_S = torch.tensor([2.0, 1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1])
    better, worse, weights = objectives.ranked_pairs(list_S, 2)
    loss, _ = objectives.bradley_terry(scores_S[better], scores_S[worse], denominator=2, weights_N=weights)
    softplus = torch.nn.functional.softplus(torch.tensor([-1.0, -2.0, -1.0, 0.0]))
    assert loss.item() == pytest.approx(((softplus[:3].mean() + softplus[3]) / 2).item())
