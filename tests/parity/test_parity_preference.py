"""Every loss of preferences that TRL has: the same random models and batch on both sides, loss, metrics and gradient.

TRL's trainers are built once; each case sets a trainer's attributes and calls its own loss on a padded batch. Ours is
the whole way: examples, packing, forward pass, objective, backward.
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
from posttrain.recipes.preference_methods import METHODS

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

VOCAB, BETA = 61, 0.3
FIGURES: list[tuple[float, float]] = []  # |Δloss| and cosine of the gradients, for the table of parity
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


class Side:
    """TRL's trainers, the two models' folders, and rows of token ids."""

    def __init__(self, folder: Path) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        self.policy, self.reference = folder / "policy", folder / "reference"
        for seed, path in ((1, self.policy), (0, self.reference)):
            torch.manual_seed(seed)
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(path)
        tokenizer = _tokenizer()
        common: dict[str, Any] = {
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "gradient_checkpointing": False,
            "max_length": None,
            "beta": BETA,
        }
        load = partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
        pairs = Dataset.from_list([{"prompt": "w5 w6", "chosen": " w7", "rejected": " w8"}] * 2)
        single = Dataset.from_list(
            [{"prompt": "w5 w6", "completion": " w7", "label": label} for label in (True, False)]
        )
        self.dpo = DPOTrainer(
            load(self.policy),
            load(self.reference),
            args=DPOConfig(**common, use_weighting=True),
            train_dataset=pairs,
            processing_class=tokenizer,
        )
        self.kto = KTOTrainer(
            load(self.policy),
            load(self.reference),
            args=KTOConfig(**common, per_device_train_batch_size=2),
            train_dataset=single,
            processing_class=tokenizer,
        )
        common = {**common, "max_length": 64}
        self.cpo = CPOTrainer(
            load(self.policy), args=CPOConfig(**common), train_dataset=pairs, processing_class=tokenizer
        )
        self.orpo = ORPOTrainer(
            load(self.policy), args=ORPOConfig(**common), train_dataset=pairs, processing_class=tokenizer
        )
        rng = random.Random(0)

        def ids(low: int, high: int) -> list[int]:
            return [rng.randrange(3, VOCAB) for _ in range(rng.randint(low, high))]

        self.rows = [{"prompt_ids": ids(1, 7), "chosen_ids": ids(1, 9), "rejected_ids": ids(1, 9)} for _ in range(6)]
        self.rows[0] |= {"chosen_ids": ids(1, 1)}  # a single token

    def answer_rows(self) -> list[dict[str, Any]]:
        return [
            {"prompt_ids": row["prompt_ids"], "completion_ids": row[side], "label": side == "chosen_ids"}
            for row, side in zip(self.rows, ["chosen_ids", "rejected_ids", "rejected_ids"] * 2, strict=True)
        ]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{index}": index for index in range(3, VOCAB)}}
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Side:
    torch.set_num_threads(1)
    return Side(tmp_path_factory.mktemp("parity"))


# TRL's side


def theirs(trainer: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, gradient by Hugging Face name, and metrics."""
    model = trainer.model
    model.train()
    model.zero_grad()
    if hasattr(trainer, "get_batch_loss_metrics"):
        loss, metrics = trainer.get_batch_loss_metrics(model, batch)
    else:
        trainer._metrics["train"].clear()
        loss = trainer.compute_loss(model, batch)
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    loss.backward()
    return loss.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}, metrics


def dpo_batch(side: Side) -> dict[str, Any]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    return DataCollatorForPreference(pad_token_id=0)(side.rows)


def concatenated_batch(side: Side) -> dict[str, torch.Tensor]:
    """What the CPO and ORPO trainers' collator gives."""
    batch = {}
    for name in ("chosen", "rejected"):
        whole = [row["prompt_ids"] + row[f"{name}_ids"] for row in side.rows]
        labels = [[-100] * len(row["prompt_ids"]) + row[f"{name}_ids"] for row in side.rows]
        for key, rows, fill in (("input_ids", whole, 0), ("labels", labels, -100)):
            longest = max(map(len, rows))
            batch[f"{name}_{key}"] = torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
        longest = max(map(len, whole))
        batch[f"{name}_attention_mask"] = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in whole])
    return batch


# Our side


def sequence(prompt: list[int], answer: list[int], *, with_prompt: bool = False) -> TokenSequence:
    mask = (False,) * len(prompt) + (True,) * len(answer)
    if not with_prompt:
        return TokenSequence(tokens=(*prompt, *answer), mask=mask)
    weights = tuple(float(is_answer) for is_answer in mask)
    whole = (False,) + (True,) * (len(mask) - 1)
    return TokenSequence(tokens=(*prompt, *answer), mask=whole, columns={"margin_weights": weights})


def pair_examples(side: Side, *, nll_over_prompt: bool = False, tail: float | None = None) -> list[Example]:
    examples = []
    for index, row in enumerate(side.rows):
        sides = [
            sequence(row["prompt_ids"], row["chosen_ids"], with_prompt=nll_over_prompt),
            sequence(row["prompt_ids"], row["rejected_ids"]),
        ]
        if nll_over_prompt:
            weights = tuple(float(is_target) for is_target in sides[1].mask)
            sides[1] = sides[1].replace(columns={"margin_weights": weights})
        if tail is not None:
            start = len(row["prompt_ids"])
            shared = start + min(len(row["chosen_ids"]), len(row["rejected_ids"]))
            sides = [
                each.replace(
                    columns={
                        "margin_weights": tuple(
                            0.0 if at < start else 1.0 if at < shared else tail for at in range(len(each.tokens))
                        )
                    }
                )
                for each in sides
            ]
        examples.append(Example(id=str(index), sequences=tuple(sides)))
    return examples


def referred(side: Side, examples: list[Example]) -> list[Example]:
    from posttrain.recipes.reference_cache import with_reference

    reference = train.Trainer(models.load(side.reference), train.TrainConfig(), train.nll_objective)
    return with_reference(examples, reference.logprobs(examples))


def ours(
    side: Side, examples: list[Example], objective: train.Objective, forward: train.Forward = train.token_forward
) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    model = models.load(side.policy)
    trainer = train.Trainer(model, train.TrainConfig(max_grad_norm=0.0), objective, forward=forward)
    grads: dict[str, torch.Tensor] = {}
    update = trainer._optimiser.step

    def step(lr: float) -> None:
        grads.update({name: weight.grad.clone() for name, weight in model.named_parameters()})
        update(lr)

    trainer._optimiser.step = step  # type: ignore[method-assign]
    metrics = trainer.step(train.with_step_scalars(examples))
    with torch.no_grad():  # gradients in the place of weights have Hugging Face names
        for name, weight in model.named_parameters():
            weight.copy_(grads[name])
    return metrics["loss"], dict(models.to_hf_tensors(model)), metrics


def check(one: tuple[float, dict, dict], other: tuple[float, dict, dict], names: tuple[str, ...]) -> None:
    (loss, grads, metrics), (their_loss, their_grads, their_metrics) = one, other
    assert abs(loss - their_loss) <= 1e-5 * max(1.0, abs(their_loss))
    assert grads.keys() == their_grads.keys()
    flat, their_flat = (
        torch.cat([side[name].double().flatten() for name in sorted(side)]) for side in (grads, their_grads)
    )
    cosine = torch.nn.functional.cosine_similarity(flat, their_flat, dim=0).item()
    FIGURES.append((abs(loss - their_loss), cosine))
    assert cosine >= 0.9999
    assert flat.norm().item() == pytest.approx(their_flat.norm().item(), rel=1e-4)
    assert flat.norm().item() > 0
    for name in names:
        assert metrics[name] == pytest.approx(their_metrics[name], rel=1e-4, abs=1e-5), name


REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
LOGPS = ("logps/chosen", "logps/rejected")


def of_pairs(loss: Any, **settings: Any) -> train.Objective:
    return train.preference_objective(loss, beta=BETA, **settings)


smooth = {"label_smoothing": 0.15}
DPO_CASES: dict[str, tuple[dict[str, Any], train.Objective]] = {
    "sigmoid": ({}, of_pairs(partial(objectives.dpo_losses, beta=BETA))),
    "sigmoid_norm": ({}, of_pairs(lambda p: objectives.dpo_losses(p.per_token(), beta=BETA))),
    "hinge": ({}, of_pairs(partial(objectives.hinge_losses, beta=BETA))),
    "ipo": ({}, of_pairs(partial(objectives.ipo_losses, tau=BETA))),
    "exo_pair": (smooth, of_pairs(partial(objectives.exo_losses, beta=BETA, **smooth))),
    "nca_pair": ({}, of_pairs(partial(objectives.nca_losses, beta=BETA))),
    "robust": (smooth, of_pairs(partial(objectives.robust_losses, beta=BETA, **smooth))),
    "bco_pair": ({}, of_pairs(partial(objectives.bco_pair_losses, beta=BETA))),
    "sppo_hard": ({}, of_pairs(partial(objectives.sppo_losses, beta=BETA))),
    "aot": (smooth, of_pairs(partial(objectives.aot_losses, beta=BETA, **smooth), whole_step=True)),
    "aot_unpaired": (smooth, of_pairs(partial(objectives.aot_unpaired_losses, beta=BETA, **smooth), whole_step=True)),
    "apo_zero": ({}, of_pairs(partial(objectives.apo_zero_losses, beta=BETA))),
    "apo_down": ({}, of_pairs(partial(objectives.apo_down_losses, beta=BETA))),
    "discopop": ({}, of_pairs(partial(objectives.discopop_losses, beta=BETA, tau=0.05))),
    "sft": ({}, of_pairs(lambda p: torch.zeros_like(p.chosen_E), nll_coef=1.0, nll_normalise="token")),
}


def set_up(trainer: Any, **settings: Any) -> None:
    """The trainer's attributes, all back to the plain ones but those that are given."""
    plain = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "use_weighting": False,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
    }
    for name, value in {**plain, **settings}.items():
        setattr(trainer, name, value)


@pytest.mark.parametrize("name", DPO_CASES)
def test_losses_of_pairs(side: Side, name: str) -> None:
    settings, objective = DPO_CASES[name]
    set_up(side.dpo, loss_types=[name], **settings)
    check(
        ours(side, referred(side, pair_examples(side)), objective), theirs(side.dpo, dpo_batch(side)), REWARDS + LOGPS
    )


def test_every_loss_of_the_dpo_trainer_is_among_them() -> None:
    from trl import DPOConfig

    known = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = {part for part in known.replace("`", "'").split("'") if part.replace("_", "").isalpha() and part.islower()}
    assert set(DPO_CASES) <= named
    assert {name for name in named if name != "loss_weights"} == set(DPO_CASES)


def test_mpo_is_a_weighted_sum(side: Side) -> None:
    set_up(side.dpo, loss_types=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    objective = of_pairs(
        lambda p: 0.8 * objectives.dpo_losses(p, beta=BETA) + 0.2 * objectives.bco_pair_losses(p, beta=BETA),
        nll_coef=1.0,
        nll_normalise="token",
    )
    check(ours(side, referred(side, pair_examples(side)), objective), theirs(side.dpo, dpo_batch(side)), REWARDS)


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_wpo_weights(side: Side, name: str) -> None:
    set_up(side.dpo, loss_types=[name], use_weighting=True)
    losses = {
        "sigmoid": partial(objectives.dpo_losses, beta=BETA),
        "ipo": partial(objectives.ipo_losses, tau=BETA),
    }
    mine = ours(
        side,
        referred(side, pair_examples(side)),
        of_pairs(losses[name], pair_weights="wpo"),
        train.collision_forward,
    )
    check(mine, theirs(side.dpo, dpo_batch(side)), REWARDS)


@pytest.mark.parametrize(
    ("theirs_name", "kind"), [("forward_kl", "forward_kl"), ("js_divergence", "js"), ("alpha_divergence", "alpha")]
)
def test_other_divergences(side: Side, theirs_name: str, kind: Any) -> None:
    set_up(side.dpo, f_divergence_type=theirs_name)
    side.dpo.f_alpha_divergence_coef = 0.4
    objective = of_pairs(lambda p: objectives.dpo_losses(objectives.f_divergence(p, kind, alpha=0.4), beta=BETA))
    check(ours(side, referred(side, pair_examples(side)), objective), theirs(side.dpo, dpo_batch(side)), ())


def test_length_desensitised_dpo_is_a_column_of_weights(side: Side) -> None:
    set_up(side.dpo, ld_alpha=0.3)
    examples = referred(side, pair_examples(side, tail=0.3))
    check(ours(side, examples, DPO_CASES["sigmoid"][1]), theirs(side.dpo, dpo_batch(side)), REWARDS + LOGPS)


@pytest.mark.parametrize(
    ("name", "smoothing"),
    [("sigmoid", 0.0), ("sigmoid", 0.15), ("hinge", 0.0), ("ipo", 0.0), ("simpo", 0.0), ("simpo", 0.15)],
)
def test_cpo_and_simpo(side: Side, name: str, smoothing: float) -> None:
    side.cpo.loss_type, side.cpo.label_smoothing, side.cpo.simpo_gamma = name, smoothing, 0.5
    side.cpo.cpo_alpha = 0.0 if name == "simpo" else 0.7
    losses = {
        "sigmoid": partial(objectives.dpo_losses, beta=BETA, label_smoothing=smoothing),
        "hinge": partial(objectives.hinge_losses, beta=BETA),
        "ipo": partial(objectives.ipo_losses, tau=BETA),
        "simpo": partial(objectives.simpo_losses, beta=BETA, gamma=0.5, label_smoothing=smoothing),
    }
    objective = of_pairs(
        losses[name],
        reference=False,
        per_token_rewards=name in ("ipo", "simpo"),
        nll_coef=side.cpo.cpo_alpha,
        nll_normalise="token",
    )
    names = REWARDS + LOGPS + (("nll_loss",) if side.cpo.cpo_alpha else ())
    check(ours(side, pair_examples(side), objective), theirs(side.cpo, concatenated_batch(side)), names)


def test_orpo(side: Side) -> None:
    objective = of_pairs(
        lambda p: BETA * objectives.orpo_losses(p),
        reference=False,
        per_token_rewards=True,
        nll_coef=1.0,
        nll_normalise="token",
    )
    examples = pair_examples(side, nll_over_prompt=True)
    mine = ours(side, examples, objective)
    check(mine, theirs(side.orpo, concatenated_batch(side)), (*REWARDS, *LOGPS, "nll_loss"))


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("good_weight", [1.0, 1.7])
def test_labelled_answers(side: Side, name: str, good_weight: float) -> None:
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    rows = side.answer_rows()
    completions = [row["completion_ids"] for row in rows]
    with_kl = [
        {**row, "KL_completion_ids": other}
        for row, other in zip(rows, completions[-1:] + completions[:-1], strict=True)
    ]
    side.kto.loss_type, side.kto.calculate_KL = name, name == "kto"
    side.kto.desirable_weight, side.kto.undesirable_weight = good_weight, 0.9
    batch = DataCollatorForUnpairedPreference(pad_token_id=0)(with_kl if name == "kto" else rows)

    def examples_of(each: list[dict[str, Any]], key: str) -> list[Example]:
        made = [
            Example(
                id=str(index),
                sequences=(sequence(row["prompt_ids"], row[key]),),
                scalars={"label": float(row["label"])},
            )
            for index, row in enumerate(each)
        ]
        return referred(side, made)

    examples, scalars = examples_of(rows, "completion_ids"), {}
    weights = {"desirable_weight": good_weight, "undesirable_weight": 0.9}
    objective = train.label_objective(getattr(objectives, name), beta=BETA, **weights)
    if name == "kto":
        from posttrain.recipes.preference_loop import log_ratios_of

        policy = train.Trainer(models.load(side.policy), train.TrainConfig(), train.nll_objective)
        ratios = log_ratios_of(policy, examples_of(with_kl, "KL_completion_ids"))
        scalars["kl"] = float(objectives.kl_baseline(torch.tensor(ratios)))
        objective = train.label_objective(objectives.kto, step={"kl": "kl"}, beta=BETA, **weights)
    mine = ours(side, train.with_step_scalars(examples, **scalars), objective)
    names = ("rewards/chosen", "rewards/rejected") + (("kl",) if name == "kto" else ())
    their = theirs(side.kto, batch)
    check(mine, their, names)
    assert name != "kto" or their[2]["kl"] > 0.1, "or the comparison would be of a clamp"


def test_the_recipes_table_makes_the_same_losses(side: Side) -> None:
    """The recipe's METHODS against TRL with the method's own settings."""
    for name in (
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "robust",
        "apo_zero",
        "discopop",
    ):
        method = METHODS[name]
        set_up(side.dpo, loss_types=[name], label_smoothing=method.label_smoothing)
        side.dpo.beta = method.beta
        try:
            mine = ours(side, referred(side, pair_examples(side)), method.objective())
            check(mine, theirs(side.dpo, dpo_batch(side)), REWARDS)
        finally:
            side.dpo.beta = BETA
