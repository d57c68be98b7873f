"""One process of two (or the only one) that trains a tiny decoder; used by test_train_ranks.

    python ranks_run.py RANK SIZE STORE OUT

Every scenario writes what happened to OUT: numbers as JSON, weights as safetensors.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from posttrain import models, train
from posttrain.core import Example, PosttrainError, TokenSequence

VOCAB = 48
NAN_TOKEN = 41
# with the usual epsilon AdamW divides rounding by rounding wherever a gradient is all but 0
SETTINGS = train.TrainConfig(lr=1e-2, eps=1e-2, max_grad_norm=0, micro_tokens=60, weight_decay=0.01)
OBJECTIVES = {
    "nll": train.nll_objective,
    "sum": train.supervised_objective("sum"),
    "sequence": train.supervised_objective("sequence"),
    "group": train.policy_objective(normalise="group"),
    "lora": train.nll_objective,
}


def make_model(seed: int = 0, lora: bool = False) -> models.Decoder:
    config = models.DecoderConfig(
        vocab_size=VOCAB,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=48,
        max_positions=64,
        init_std=0.1,
    )
    model = models.Decoder.random(config, seed)
    return models.add_adapters(model, models.LoraConfig(rank=4), seed=seed) if lora else model


def make_examples(count: int, seed: int = 0, live: bool = True) -> list[Example]:
    """Groups of three, so that two ranks share every group; each fourth example has no group, each fifth no target."""
    rng = random.Random(seed)
    examples = []
    for index in range(count):
        length = rng.randint(4, 30)
        prompt = rng.randint(1, length - 1)
        columns = {name: tuple(rng.gauss(0.0, 0.5) for _ in range(length)) for name in ("advantages", "old_logprobs")}
        columns["old_logprobs"] = tuple(value - 3.8 for value in columns["old_logprobs"])
        mask = tuple(live and index % 5 != 4 and place >= prompt for place in range(length))
        tokens = tuple(rng.randrange(40) for _ in range(length))
        examples.append(
            Example(
                id=f"example-{seed}-{index}",
                sequences=(TokenSequence(tokens=tokens, mask=mask, columns=columns),),
                group="" if index % 4 == 3 else f"group-{index // 3}",
            )
        )
    return examples


class Run:
    """The scenarios, as one rank sees them."""

    def __init__(self, ranks: train.Ranks | None, out: Path) -> None:
        self.ranks, self.out = ranks, out
        self.rank = 0 if ranks is None else ranks.rank
        self.found: dict[str, Any] = {}

    def share(self, examples: list[Example]) -> list[Example]:
        return examples if self.ranks is None else self.ranks.share_of(examples)

    def trainer(self, objective: Any, model: models.Decoder) -> train.Trainer:
        return train.Trainer(model, SETTINGS, objective, ranks=self.ranks)

    def keep(self, name: str, model: models.Decoder) -> None:
        tensors = {key: value.detach().clone().contiguous() for key, value in model.state_dict().items()}
        save_file(tensors, self.out / f"{name}-{self.rank}.safetensors")

    def error_of(self, name: str, model: models.Decoder, examples: list[Example]) -> None:
        trainer = self.trainer(train.nll_objective, model)
        try:
            trainer.step(examples)
        except PosttrainError as error:
            self.found[name] = f"{type(error).__name__}: {error}"
        self.keep(name, model)

    def keep_gradient(self, name: str, trainer: train.Trainer) -> None:
        """Write the first step's gradient, just before the weights move."""
        update = trainer._optimiser.step

        def step(lr: float) -> None:
            if trainer.num_steps == 0:
                grads = {key: weight.grad.clone() for key, weight in trainer._weights.items()}
                save_file(grads, self.out / f"{name}-gradient-{self.rank}.safetensors")
            update(lr)

        trainer._optimiser.step = step  # type: ignore[method-assign]

    def all(self) -> None:
        for name, objective in OBJECTIVES.items():
            model = make_model(seed=self.rank, lora=name == "lora")  # not the same start: the first rank's counts
            trainer = self.trainer(objective, model)
            self.keep_gradient(name, trainer)
            for step in range(3):
                metrics = trainer.step(self.share(make_examples(23, seed=step)))
            self.found[name] = {key: value for key, value in metrics.items() if key not in train.TIMING_METRICS}
            self.found[f"{name}-eval"] = trainer.evaluate(self.share(make_examples(9, seed=77)))
            self.keep(name, model)
        for name, other in [("none", []), ("dead", make_examples(3, seed=5, live=False))]:
            model = make_model()
            trainer = self.trainer(train.nll_objective, model)
            self.keep_gradient(name, trainer)
            whole = make_examples(7, seed=4)
            metrics = trainer.step([*whole, *other] if self.ranks is None else [whole, other][self.rank])
            self.found[name] = {key: value for key, value in metrics.items() if key not in train.TIMING_METRICS}
            self.keep(name, model)
        if self.ranks is not None:
            self.failures()
        (self.out / f"found-{self.rank}.json").write_text(json.dumps(self.found))

    def failures(self) -> None:
        poisoned = make_model()
        with torch.no_grad():
            poisoned.embed.weight[NAN_TOKEN] = float("nan")
        bad = TokenSequence(tokens=(1, NAN_TOKEN, 2), mask=(False, False, True))
        clean = [example.replace(sequences=(cleared(example),)) for example in make_examples(3)]
        self.error_of("nan", poisoned, clean if self.rank == 0 else [Example(id="poison", sequences=(bad,))])
        outside = Example(id="outside", sequences=(TokenSequence(tokens=(1, 99), mask=(False, True)),))
        self.error_of("malformed", make_model(), [outside] if self.rank == 0 else clean)
        self.error_of("all-dead", make_model(), make_examples(2, seed=self.rank, live=False))


def cleared(example: Example) -> TokenSequence:
    return example.sequences[0].replace(columns={})


if __name__ == "__main__":
    torch.set_num_threads(1)
    number, size, store, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    joined = None
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=size)
        joined = train.Ranks()
    Run(joined, folder).all()
    if joined is not None:
        dist.destroy_process_group()
