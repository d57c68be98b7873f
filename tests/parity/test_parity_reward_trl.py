"""Reward models against TRL's RewardTrainer, and process rewards against `transformers`' token classification.

TRL 1.16 has no PRMTrainer; what it computed was the cross-entropy of a token classifier of two labels at the ends of
steps, which is what `transformers` computes here.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import models, train
from posttrain.core import Example, TokenSequence
from posttrain.models import Decoder, DecoderConfig, ScoredDecoder
from posttrain.models.heads_folder import _scored_tensors
from posttrain.render import Tokenizer

transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

FIGURES: list[tuple[float, float]] = []  # |Δloss| and cosine of the gradients, for the table of parity
VOCAB, PAD = 300, 0


def config(**changes: Any) -> DecoderConfig:
    shape = {
        "family": "qwen2",
        "qkv_bias": True,
        "vocab_size": VOCAB,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mlp_width": 48,
        "max_positions": 64,
        "init_std": 0.1,
        "pad_id": PAD,
        "eos_ids": (1,),
    }
    return DecoderConfig(**{**shape, **changes})


def pairs(count: int, *, margins: bool) -> list[dict[str, Any]]:
    rng = random.Random(4)
    rows = []
    for _ in range(count):
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randint(2, 8))]
        sides = [prompt + [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 12))] for _ in range(2)]
        rows.append(
            {"chosen_ids": sides[0], "rejected_ids": sides[1]} | ({"margin": rng.uniform(0, 2)} if margins else {})
        )
    return rows


def example(index: int, row: dict[str, Any]) -> Example:
    def side(tokens: list[int], level: float) -> TokenSequence:
        last = len(tokens) - 1
        columns = {"levels": (0.0,) * last + (level,)} if "margin" in row else {}
        return TokenSequence(tokens=tuple(tokens), mask=(False,) * last + (True,), columns=columns)

    sequences = (side(row["chosen_ids"], row.get("margin", 0.0)), side(row["rejected_ids"], 0.0))
    return Example(id=str(index), sequences=sequences)


def ours(
    model: ScoredDecoder, examples: list[Example], objective: train.Objective, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics of one step, and its gradient under the names of a Hugging Face folder."""
    settings = train.TrainConfig(lr=0.0, max_grad_norm=0, micro_tokens=64)
    trainer = train.Trainer(model, settings, objective, forward=train.score_forward)
    grads: dict[str, torch.Tensor] = {}

    def look(lr: float) -> None:
        for weight in model.parameters():
            weight.data = weight.data.clone()
        values = [weight.data for weight in model.parameters()]
        for weight in model.parameters():
            weight.data = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        grads.update({name: tensor.clone() for name, tensor in _scored_tensors(model)})
        for weight, value in zip(model.parameters(), values, strict=True):
            weight.data = value

    monkeypatch.setattr(trainer._optimiser, "step", look)
    return trainer.step(examples), grads


def cosine(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert mine.keys() == theirs.keys()
    flat = [torch.cat([each[name].double().flatten() for name in sorted(mine)]) for each in (mine, theirs)]
    return torch.nn.functional.cosine_similarity(*flat, dim=0).item()


@pytest.mark.parametrize("center", [None, 0.05])
@pytest.mark.parametrize("margins", [False, True])
def test_reward_trainer(margins: bool, center: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScoredDecoder(Decoder.random(config(), seed=1), seed=2)
    tokenizer = Tokenizer.train_bpe(["to be or not to be"], 262)
    models.save_scored(model, tmp_path / "rm", tokenizer=tokenizer)
    rows = pairs(8, margins=margins)
    args = trl.RewardConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=8,
        center_rewards_coefficient=center,
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=True,
        dataloader_pin_memory=False,
    )
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype="float32")
    processing = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "rm")
    trainer = trl.RewardTrainer(
        model=theirs, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=processing
    )
    theirs.config.pad_token_id = PAD  # the ids above are no text of the tokenizer's
    batch = trainer.data_collator(rows)
    batch["input_ids"][batch["attention_mask"] == 0] = PAD
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()

    metrics, grads = ours(
        model,
        [example(index, row) for index, row in enumerate(rows)],
        train.reward_objective(center=center or 0.0),
        monkeypatch,
    )
    assert abs(metrics["loss"] - loss.item()) <= 1e-5
    expected = {name: weight.grad for name, weight in theirs.named_parameters()}
    FIGURES.append((abs(metrics["loss"] - loss.item()), cosine(grads, expected)))
    assert cosine(grads, expected) >= 0.9999
    for name in grads:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-3, atol=1e-6)
    logged = {name: values[0] for name, values in trainer._metrics["train"].items() if name != "num_tokens"}
    for name, value in logged.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5), name


def test_process_loss_is_a_token_classifier_of_two_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScoredDecoder(Decoder.random(config(), seed=1), seed=2)
    models.save(model.decoder, tmp_path / "lm")
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(
        tmp_path / "lm", num_labels=2, dtype="float32"
    ).train()
    theirs.dropout.p = 0.0
    with torch.no_grad():
        theirs.score.weight.copy_(torch.stack((-model.score.weight[0], model.score.weight[0])) / 2)
        theirs.score.bias.zero_()
    rng = random.Random(1)
    examples, tokens, labels = [], [], []
    for index in range(6):
        length = 20
        ids = [rng.randrange(2, VOCAB) for _ in range(length)]
        ends = sorted(rng.sample(range(1, length), 3))
        own = [-100] * length
        for end in ends:
            own[end] = rng.randint(0, 1)
        tokens.append(ids)
        labels.append(own)
        sequence = TokenSequence(
            tokens=tuple(ids),
            mask=tuple(place in ends for place in range(length)),
            columns={"labels": tuple(float(max(label, 0)) for label in own)},
        )
        examples.append(Example(id=str(index), sequences=(sequence,)))
    loss = theirs(input_ids=torch.tensor(tokens), labels=torch.tensor(labels)).loss
    loss.backward()
    metrics, grads = ours(model, examples, train.process_objective(), monkeypatch)
    assert abs(metrics["loss"] - loss.item()) <= 1e-5
    expected = {name: weight.grad for name, weight in theirs.named_parameters() if not name.startswith("score")}
    # one logit is the difference of the two, and moves each of them by half
    expected["score.weight"] = theirs.score.weight.grad[1:] - theirs.score.weight.grad[:1]
    expected["score.weight"] = expected["score.weight"] / 2
    FIGURES.append((abs(metrics["loss"] - loss.item()), cosine(grads, expected)))
    assert cosine(grads, expected) >= 0.9999
