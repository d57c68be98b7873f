"""A tiny decoder and random examples for the tests of `train`."""

from __future__ import annotations

import random

import pytest
import torch

from posttrain import models
from posttrain.core import Example, TokenSequence

VOCAB = 48


@pytest.fixture(autouse=True)
def one_thread():
    """The machine is shared, and one thread is enough for tiny matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_model():
    """A function that makes the same tiny decoder each time."""

    def make(seed: int = 0, **changes):
        shape = {
            "vocab_size": VOCAB,
            "width": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "mlp_width": 48,
            "max_positions": 64,
            "init_std": 0.1,
        }
        return models.Decoder.random(models.DecoderConfig(**{**shape, **changes}), seed)

    return make


@pytest.fixture
def make_examples():
    """A function that makes random examples with the columns of a policy gradient."""

    def make(count: int, *, seed: int = 0, num_sequences: int = 1, group_size: int = 1) -> list[Example]:
        rng = random.Random(seed)

        def sequence() -> TokenSequence:
            length = rng.randint(4, 24)
            prompt = rng.randint(1, length - 1)
            return TokenSequence(
                tokens=tuple(rng.randrange(VOCAB) for _ in range(length)),
                mask=tuple((index >= prompt and rng.random() < 0.9) or index == prompt for index in range(length)),
                columns={
                    name: tuple(rng.gauss(mean, 0.3) for _ in range(length))
                    for name, mean in [
                        ("advantages", 0.0),
                        ("old_logprobs", -3.8),
                        ("ref_logprobs", -3.8),
                        ("sampler_logprobs", -3.8),
                    ]
                },
            )

        return [
            Example(
                id=f"example-{index}",
                sequences=tuple(sequence() for _ in range(num_sequences)),
                group=f"group-{index // group_size}",
                scalars={"weight": rng.uniform(0.5, 2.0)},
            )
            for index in range(count)
        ]

    return make


@pytest.fixture
def before_update(monkeypatch):
    """A function that has a look at the gradients just before the weights move, after clipping."""

    def watch(trainer, look):
        update = trainer._optimiser.step

        def step(lr):
            look()
            update(lr)

        monkeypatch.setattr(trainer._optimiser, "step", step)

    return watch
