"""Every policy loss of TRL's GRPOTrainer and RLOOTrainer: the same weights and prepared batch, loss and gradient.

TRL's trainers are built once; each case sets attributes and calls the trainer's own `_compute_loss` on a padded batch.
Ours is the whole way: examples, packing, forward pass, objective, backward.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import models, objectives, train
from posttrain.core import Example, TokenSequence
from posttrain.recipes.rl_credit import with_column
from posttrain.recipes.rl_learner import entropy_forward

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

pytestmark = pytest.mark.slow

FIGURES: list[tuple[float, float]] = []  # |Δloss| and cosine of the gradients, for the table of parity
VOCAB, GROUP, ROWS, MAX = 61, 4, 8, 12
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{index}": index for index in range(3, VOCAB)}}
    plain = Tokenizer(kinds.WordLevel(vocab, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


class Side:
    """TRL's trainers, the model's folder, and rows with everything that a batch needs."""

    def __init__(self, folder: Path) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

        self.path = folder / "model"
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(self.path)
        common: dict[str, Any] = {
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "gradient_checkpointing": False,
            "per_device_train_batch_size": ROWS,
            "num_generations": GROUP,
            "max_completion_length": MAX,
        }
        load = partial(transformers.AutoModelForCausalLM.from_pretrained, self.path, dtype=torch.float32)
        rest: dict[str, Any] = {
            "reward_funcs": lambda completions, **_: [0.0] * len(completions),
            "train_dataset": Dataset.from_list([{"prompt": "w5 w6"}] * ROWS),
            "processing_class": _tokenizer(),
        }
        self.grpo = GRPOTrainer(load(), args=GRPOConfig(**common), **rest)
        self.rloo = RLOOTrainer(load(), args=RLOOConfig(**common), **rest)
        for trainer in (self.grpo, self.rloo):
            trainer.current_gradient_accumulation_steps = 1
        self.examples = self._examples()

    def _examples(self) -> list[Example]:
        rng = random.Random(1)
        examples = []
        for row in range(ROWS):
            prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 6))]
            answer = [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, MAX))]
            advantage = rng.gauss(0, 1)
            sequence = TokenSequence(
                tokens=(*prompt, *answer),
                mask=(False,) * len(prompt) + (True,) * len(answer),
                columns={"advantages": (advantage,) * (len(prompt) + len(answer))},
            )
            examples.append(Example(id=str(row), sequences=(sequence,), group=f"group-{row // GROUP}"))
        trainer = train.Trainer(models.load(self.path), train.TrainConfig(entropy=True), train.nll_objective)
        examples = with_column(examples, "now", trainer)

        def noisy(example: Example) -> Example:
            (sequence,) = example.sequences
            now = sequence.columns["now"]

            def near(values: tuple[float, ...], spread: float) -> tuple[float, ...]:
                return tuple(value + rng.gauss(0, spread) for value in values)

            old = near(now, 0.3)
            columns = {"advantages": sequence.columns["advantages"], "old_logprobs": old}
            columns |= {"ref_logprobs": near(now, 0.4), "sampler_logprobs": near(old, 0.3)}
            return example.replace(sequences=(sequence.replace(columns=columns),))

        return [noisy(example) for example in examples]

    def padded(self) -> dict[str, torch.Tensor]:
        """The batch as TRL prepares it: prompts padded on the left, answers on the right."""
        sequences = [example.sequences[0] for example in self.examples]
        starts = [sequence.mask.index(True) for sequence in sequences]
        widest, longest = max(starts), max(len(s.tokens) - start for s, start in zip(sequences, starts, strict=True))

        def answers(values: list[Any], fill: Any) -> torch.Tensor:
            return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in values])

        pairs = list(zip(sequences, starts, strict=True))
        batch = {
            "prompt_ids": torch.tensor([[0] * (widest - at) + list(s.tokens[:at]) for s, at in pairs]),
            "prompt_mask": torch.tensor([[0] * (widest - at) + [1] * at for _, at in pairs]),
            "completion_ids": answers([s.tokens[at:] for s, at in pairs], 0),
            "completion_mask": answers([[1] * (len(s.tokens) - at) for s, at in pairs], 0),
            "advantages": torch.tensor([s.columns["advantages"][0] for s in sequences]),
        }
        for ours, theirs in [
            ("old_logprobs", "old_per_token_logps"),
            ("ref_logprobs", "ref_per_token_logps"),
            ("sampler_logprobs", "sampling_per_token_logps"),
        ]:
            batch[theirs] = answers([s.columns[ours][at:] for s, at in pairs], 0.0)
        batch["num_items_in_batch"] = batch["completion_mask"].sum()
        return batch


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Side:
    torch.set_num_threads(1)
    return Side(tmp_path_factory.mktemp("rl"))


def theirs(trainer: Any, batch: dict[str, torch.Tensor], settings: dict[str, Any], monkeypatch: Any) -> Any:
    """TRL's loss and gradient by parameter name; settings beginning with `args.` go to the trainer's arguments."""
    for name, value in settings.items():
        owner, _, field = name.rpartition(".")
        monkeypatch.setattr(trainer.args if owner else trainer, field, value)
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    grads = {name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    return loss.item(), grads


def ours(side: Side, examples: list[Example], objective: train.Objective, monkeypatch: Any, micro: int = 40) -> Any:
    """Our loss and gradient under Hugging Face's names, accumulated over several micro-batches."""
    model = models.load(side.path)
    settings = train.TrainConfig(lr=0.0, max_grad_norm=0, micro_tokens=micro, entropy=True)
    trainer = train.Trainer(model, settings, objective)
    grads: dict[str, torch.Tensor] = {}

    def look(lr: float) -> None:
        values = [weight.data for weight in model.parameters()]
        for weight in model.parameters():
            weight.data = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        grads.update({name: tensor.clone() for name, tensor in models.to_hf_tensors(model)})
        for weight, value in zip(model.parameters(), values, strict=True):
            weight.data = value

    monkeypatch.setattr(trainer._optimiser, "step", look)
    metrics = trainer.step(examples)
    assert metrics["num_micro_batches"] > 1
    return metrics, grads


def agree(found: Any, expected: Any) -> None:
    """Loss within 1e-5, gradient in the same direction (cosine ≥ 0.9999) and of the same length (1e-3)."""
    (metrics, ours_by_name), (loss, theirs_by_name) = found, expected
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert ours_by_name.keys() == theirs_by_name.keys()
    own, their = (
        torch.cat([grads[name].flatten().double() for name in sorted(theirs_by_name)])
        for grads in (ours_by_name, theirs_by_name)
    )
    assert their.norm() > 1e-4
    cosine = torch.cosine_similarity(own, their, dim=0).item()
    FIGURES.append((abs(metrics["loss"] - loss), cosine))
    assert cosine >= 0.9999
    assert own.norm().item() == pytest.approx(their.norm().item(), rel=1e-3)


# TRL's settings, and ours for the same loss. `entropy_coef` etc. in both by their own names.
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {"normalise": "sequence"}),
    "bnpo": ({"loss_type": "bnpo"}, {"normalise": "token"}),
    "dapo": ({"loss_type": "dapo"}, {"normalise": "token"}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"normalise": "constant", "max_length": MAX}),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.1},
        {"surrogate": partial(objectives.cispo_surrogate, clip_high=0.1)},
    ),
    "sapo": ({"loss_type": "sapo"}, {"surrogate": objectives.sapo_surrogate, "normalise": "sequence"}),
    "vespo": ({"loss_type": "vespo"}, {"surrogate": objectives.vespo_surrogate}),
}
CLIP = ({"epsilon_low": 0.2, "epsilon_high": 0.28}, {"clip_low": 0.2, "clip_high": 0.28})
LEVELS = {
    "token": ({"importance_sampling_level": "token"}, {"ratio": "token"}),
    "sequence": ({"importance_sampling_level": "sequence"}, {"ratio": "sequence"}),
}
EXTRAS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"beta": 0.0}, {}),
    "kl": ({"beta": 0.1, "args.use_bias_correction_kl": False}, {"kl_coef": 0.1}),
    "unbiased kl": ({"beta": 0.1, "args.use_bias_correction_kl": True}, {"kl_coef": 0.1, "kl_unbiased": True}),
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(
    ("name", "level"), [(name, level) for name in LOSSES for level in LEVELS if (name, level) != ("vespo", "sequence")]
)
def test_every_loss_type(side: Side, monkeypatch: Any, name: str, level: str, extra: str) -> None:
    """All of them at both levels; VESPO has a ratio of its own, and TRL refuses it at the sequence's."""
    parts = [CLIP, LOSSES[name], LEVELS[level], EXTRAS[extra]]
    settings = {key: value for theirs_part, _ in parts for key, value in theirs_part.items()}
    options = {key: value for _, ours_part in parts for key, value in ours_part.items()}
    expected = theirs(side.grpo, side.padded(), settings, monkeypatch)
    agree(ours(side, side.examples, train.policy_objective(**options), monkeypatch), expected)


@pytest.mark.parametrize("extra", EXTRAS)
def test_length_unbiased_sequences(side: Side, monkeypatch: Any, extra: str) -> None:
    settings = {**CLIP[0], **LEVELS["sequence"][0], **EXTRAS[extra][0], "loss_type": "luspo"}
    objective = train.policy_objective(**CLIP[1], ratio="sequence", normalise="sequence_sum", **EXTRAS[extra][1])
    agree(ours(side, side.examples, objective, monkeypatch), theirs(side.grpo, side.padded(), settings, monkeypatch))


def test_two_sided_clip(side: Side, monkeypatch: Any) -> None:
    settings = {**CLIP[0], "loss_type": "dapo", "beta": 0.0, "args.delta": 1.4}
    objective = train.policy_objective(**CLIP[1], dual_clip=1.4)
    agree(ours(side, side.examples, objective, monkeypatch), theirs(side.grpo, side.padded(), settings, monkeypatch))


@pytest.mark.parametrize("bound", ["truncate", "mask"])
@pytest.mark.parametrize(("loss_type", "level"), [("dapo", "token"), ("dapo", "sequence"), ("vespo", "token")])
def test_importance_weights(side: Side, monkeypatch: Any, level: str, bound: str, loss_type: str) -> None:
    """The ratio as TRL's documentation defines each mode; its use in the loss is TRL's."""
    low, high = 0.55, 1.8
    batch = side.padded()
    difference = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]) * batch["completion_mask"]
    ratio = (difference if level == "token" else difference.sum(-1, keepdim=True)).exp()
    outside = (ratio < low) | (ratio > high)
    assert outside.any()
    assert not outside.all()
    batch["importance_sampling_ratio"] = (
        ratio.clamp(low, high) if bound == "truncate" else ratio.masked_fill(outside, 0)
    )
    settings = {**CLIP[0], "loss_type": loss_type, "beta": 0.0, "use_vllm": True}
    settings["vllm_importance_sampling_correction"] = True
    objective = train.policy_objective(
        **CLIP[1],
        surrogate=LOSSES[loss_type][1].get("surrogate"),
        importance_low=low,
        importance_cap=high,
        importance_bound=bound,
        importance_level=level,
    )
    agree(ours(side, side.examples, objective, monkeypatch), theirs(side.grpo, batch, settings, monkeypatch))


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_off_policy_sequence_mask(side: Side, monkeypatch: Any, threshold: float) -> None:
    settings = {**CLIP[0], "loss_type": "dapo", "beta": 0.1, "off_policy_mask_threshold": threshold}
    settings["args.use_bias_correction_kl"] = False
    objective = train.policy_objective(**CLIP[1], stale_threshold=threshold, kl_coef=0.1)
    found = ours(side, side.examples, objective, monkeypatch)
    assert 0 < found[0]["sampling/kept"] < 1
    agree(found, theirs(side.grpo, side.padded(), settings, monkeypatch))


def test_only_tokens_of_high_entropy(side: Side, monkeypatch: Any) -> None:
    settings = {**CLIP[0], "loss_type": "dapo", "beta": 0.0, "top_entropy_quantile": 0.3}
    judge = train.Trainer(models.load(side.path), train.TrainConfig(), train.nll_objective, forward=entropy_forward)
    measured = with_column(side.examples, "policy_weights", judge)
    sequences = [example.sequences[0] for example in measured]
    flat = [
        value
        for sequence in sequences
        for value, target in zip(sequence.columns["policy_weights"], sequence.mask, strict=True)
        if target
    ]
    kept = iter(objectives.high_entropy_mask(torch.tensor(flat), 0.3).tolist())
    examples = [
        example.replace(
            sequences=(
                sequence.replace(
                    columns={
                        **sequence.columns,
                        "policy_weights": tuple(float(target and next(kept)) for target in sequence.mask),
                    }
                ),
            )
        )
        for example, sequence in zip(measured, sequences, strict=True)
    ]
    found = ours(side, examples, train.policy_objective(**CLIP[1]), monkeypatch)
    agree(found, theirs(side.grpo, side.padded(), settings, monkeypatch))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_entropy_bonus(side: Side, monkeypatch: Any, loss_type: str) -> None:
    settings = {**CLIP[0], **LOSSES[loss_type][0], "beta": 0.0, "_entropy_bonus_enabled": True, "entropy_coef": 0.05}
    objective = train.policy_objective(**CLIP[1], **LOSSES[loss_type][1], entropy_coef=0.05)
    agree(ours(side, side.examples, objective, monkeypatch), theirs(side.grpo, side.padded(), settings, monkeypatch))


def test_adaptive_entropy_coefficient(side: Side, monkeypatch: Any) -> None:
    """TRL's controller over four steps at one entropy, on either side of its target, and ours."""
    trainer, batch = side.grpo, side.padded()
    for target in (0.0, 100.0):
        settings = {
            "loss_type": "dapo",
            "beta": 0.0,
            "_entropy_bonus_enabled": True,
            "use_adaptive_entropy": True,
            "entropy_coef": 0.012,
            "_last_world_entropy": 0.0,
            "_entropy_window_stats": None,
            "args.entropy_target": target,
            "args.entropy_coef_delta": 0.005,
            "args.entropy_coef_min": 0.0,
            "args.entropy_coef_max": 0.02,
        }
        coef = 0.012
        theirs(trainer, batch, settings, monkeypatch)
        for _ in range(4):
            coef = objectives.adapt_entropy_coef(
                coef, trainer._last_world_entropy, target=target, delta=0.005, low=0.0, high=0.02
            )
            assert trainer.entropy_coef == pytest.approx(coef, abs=1e-12)
            trainer._compute_loss(trainer.model, batch)
        assert trainer.entropy_coef in (0.0, 0.02)


def test_rloo(side: Side, monkeypatch: Any) -> None:
    batch = side.padded()
    batch["old_logps"] = (batch["old_per_token_logps"] * batch["completion_mask"]).sum(1)
    expected = theirs(side.rloo, batch, {"epsilon_low": 0.3, "epsilon_high": 0.4}, monkeypatch)
    objective = train.policy_objective(ratio="sequence_product", normalise="sequence", clip_low=0.3, clip_high=0.4)
    examples = [
        example.replace(
            sequences=tuple(
                s.replace(columns={name: s.columns[name] for name in ("advantages", "old_logprobs")})
                for s in example.sequences
            )
        )
        for example in side.examples
    ]
    found = ours(side, examples, objective, monkeypatch)
    agree(found, expected)
