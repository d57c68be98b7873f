"""Recorded decoding steps: sizes, replays and swapped weights, with a recorder that stands for CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.core import Sampling
from posttrain.engine import LocalEngine
from posttrain.engine.decoding import PlainDecoding
from posttrain.engine.graphs import StepGraphs

CPU = torch.device("cpu")


class FakeRecorder:
    """Replays by doing the work again into the same memory, as a graph does."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.num_recorded += 1
        out = torch.full_like(work(), float("nan"))  # a recording computes nothing that may be read

        def replay() -> None:
            self.num_replayed += 1
            out.copy_(work())

        return out, replay


@pytest.mark.parametrize(
    ("rows", "longest", "expected"),
    [
        (1, 0, (1, 128)),
        (3, 127, (4, 128)),
        (5, 128, (8, 256)),
        (33, 255, (64, 256)),
        (65, 300, (96, 512)),
        (100, 990, (100, 1000)),
    ],
)
def test_sizes_hold_the_rows_and_one_more_token(rows: int, longest: int, expected: tuple[int, int]) -> None:
    graphs = StepGraphs(lambda *_: torch.zeros(1), num_slots=100, max_length=1000, device=CPU, record=FakeRecorder())
    assert graphs.sizes(rows, longest) == expected
    assert expected[1] > longest


def recorded(engine: LocalEngine) -> FakeRecorder:
    """Let an engine decode through recordings."""
    stepper, recorder = engine._stepper, FakeRecorder()
    stepper.decoding = PlainDecoding(stepper.model, stepper.rows, engine.max_length, recorder)
    return recorder


def test_an_engine_samples_the_same_through_recordings(make_engine: Callable[..., LocalEngine]) -> None:
    prompts = ["a", "some words", "many more words than the others have", "x" * 100]
    sampling = Sampling(max_tokens=50, seed=3, n=2, ignore_eos=True)
    plain = make_engine(max_batch=8).generate(prompts, sampling)
    engine = make_engine(max_batch=8)
    recorder = recorded(engine)
    through = engine.generate(prompts, sampling)
    assert [one.tokens for one in through] == [one.tokens for one in plain]
    for mine, other in zip(through, plain, strict=True):
        assert mine.policy_logprobs == pytest.approx(other.policy_logprobs, abs=1e-4)
    assert recorder.num_replayed == 49
    assert recorder.num_recorded == 2, "eight rows of up to 128 and of up to 256 tokens"


def test_rows_that_end_leave_the_others_alone(make_engine: Callable[..., LocalEngine]) -> None:
    prompts = [[65 + place] * (place + 1) for place in range(7)]
    engine = make_engine(max_batch=3)
    recorder = recorded(engine)
    lengths = [3, 9, 1, 14, 6, 2, 11]
    requests = [Sampling(max_tokens=length, temperature=0.0, ignore_eos=True) for length in lengths]
    through = [engine.generate([prompt], how)[0].tokens for prompt, how in zip(prompts, requests, strict=True)]
    together = engine.generate(prompts, Sampling(max_tokens=14, temperature=0.0, ignore_eos=True))
    assert [one.tokens[:length] for one, length in zip(together, lengths, strict=True)] == through
    assert recorder.num_recorded == 2, "one row, and the three slots"


def test_other_weights_are_recorded_anew_unless_they_are_in_place(
    make_engine: Callable[..., LocalEngine], make_model: Callable[..., Any]
) -> None:
    sampling = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    engine = make_engine(make_model(0))
    recorder = recorded(engine)
    engine.generate(["abc"], sampling)
    engine.update_weights(dict(make_model(1).named_parameters()), 1)
    in_place = engine.generate(["abc"], sampling)
    assert recorder.num_recorded == 1
    engine.update_weights(make_model(2), 2)
    moved = engine.generate(["abc"], sampling)
    assert recorder.num_recorded == 2
    for found, seed in ((in_place, 1), (moved, 2)):
        assert found[0].tokens == make_engine(make_model(seed)).generate(["abc"], sampling)[0].tokens
