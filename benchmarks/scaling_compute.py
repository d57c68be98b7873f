"""How the sampler and the trainer scale: rate against batch, length, siblings, vocabulary and parameters."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from posttrain import models
from posttrain.core import Example, SampleRequest, Sampling, TokenSequence, generator
from posttrain.engine import LocalEngine
from posttrain.train import TrainConfig, Trainer, nll_objective

Point = tuple[float, float]

SMALL: dict[str, Any] = {
    "family": "qwen2",
    "vocab_size": 1024,
    "width": 256,
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
    "mlp_width": 704,
    "max_positions": 4096,
    "qkv_bias": True,
    "tie_embeddings": True,
    "eos_ids": (0,),
}


class Ids:
    """A tokenizer that has nothing to say."""

    eos_ids = frozenset({0})

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Never asked."""
        raise NotImplementedError

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """No text."""
        return ""


def make_model(**changes: Any) -> models.Decoder:
    """The small decoder, or one that differs from it."""
    return models.Decoder.random(models.DecoderConfig(**{**SMALL, **changes}), 0)


def sampling_rate(
    model: models.Decoder, *, prompts: int, siblings: int = 1, prompt_tokens: int = 32, new_tokens: int = 64, reps: int
) -> float:
    """Tokens written per second in bf16, prompts read and all; the median of `reps`."""
    vocabulary = model.config.vocab_size
    draw = generator(0, "scaling")
    asked = [[draw.randrange(1, vocabulary) for _ in range(prompt_tokens)] for _ in range(prompts)]
    engine = LocalEngine(
        model,
        Ids(vocabulary),
        max_batch=min(256, prompts * siblings),
        max_length=prompt_tokens + new_tokens,
        dtype=torch.bfloat16,
        inline=True,
    )
    sampling = Sampling(max_tokens=new_tokens, ignore_eos=True, n=siblings)
    seconds = _median_s(lambda: engine.generate(asked, sampling), reps)
    engine.close()
    return prompts * siblings * new_tokens / seconds


def training_rate(model: models.Decoder, *, rows: int, length: int, reps: int) -> float:
    """Tokens trained on per second with products in bf16; the median of `reps`."""
    draw = generator(1, "scaling")
    examples = []
    for row in range(rows):
        tokens = tuple(draw.randrange(1, model.config.vocab_size) for _ in range(length))
        sequence = TokenSequence(tokens=tokens, mask=(False,) + (True,) * (length - 1))
        examples.append(Example(id=str(row), sequences=(sequence,)))
    trainer = Trainer(model, TrainConfig(lr=1e-6, dtype="bfloat16"), nll_objective)
    return rows * length / _median_s(lambda: trainer.step(examples), reps)


def scheduler_overhead(queued: Sequence[int], reps: int) -> list[Point]:
    """Microseconds per step, against how many requests wait behind the running ones.

    The model is next to nothing, so that a step is the scheduler's work: 64 rows run, the rest waits.
    """
    model = make_model(vocab_size=64, width=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16, mlp_width=16)
    found = []
    for waiting in queued:
        per_step = []
        for _ in range(reps):
            engine = LocalEngine(model, Ids(64), max_batch=64, max_length=128, inline=True)
            requests = [
                SampleRequest(prompt=(1, 2, 3), sampling=Sampling(max_tokens=100, ignore_eos=True), id=str(place))
                for place in range(64 + waiting)
            ]
            for request in requests:
                engine._stepper.add(engine._prepare(request))
            stepper = engine._stepper
            with torch.inference_mode():
                stepper.step()  # reads the first prompts
                started_s = time.perf_counter()
                for _ in range(90):
                    stepper.step()
                per_step.append((time.perf_counter() - started_s) / 90)
        found.append((float(waiting), 1e6 * statistics.median(per_step)))
    return found


def _median_s(work: Callable[[], object], reps: int) -> float:
    work()
    seconds = []
    for _ in range(reps):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)
