"""LocalEngine: exact against plain forward passes, independent of the crowd, sharing prefill, ending in every way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from posttrain.core import Completion, EngineError, Sampling, StopReason
from posttrain.engine import LocalEngine
from posttrain.models import Decoder

MakeEngine = Callable[..., LocalEngine]
PROMPTS = ["a", "hello there", "The quick brown fox jumps over the lazy dog", "12"]


def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """The slow and plain way: the whole sequence again for every token."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def forward_logprobs(model: Decoder, prompt: list[int], completion: Completion) -> torch.Tensor:
    """Logprobs of the sampled tokens as a trainer computes them, in one pass."""
    tokens = torch.tensor([[*prompt, *completion.tokens]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(tokens), -1)
    return logprobs[0, len(prompt) - 1 : -1].gather(1, tokens[0, len(prompt) :, None]).squeeze(1)


def same(ours: list[Completion], theirs: list[Completion]) -> None:
    """The same tokens, and logprobs up to rounding."""
    assert [completion.tokens for completion in ours] == [completion.tokens for completion in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.text == other.text
        assert one.stop_reason == other.stop_reason


@pytest.mark.parametrize(
    "options", [{}, {"prefill_tokens": 5}, {"max_batch": 2}, {"prefill_tokens": 1, "max_batch": 1}]
)
def test_greedy_is_the_plain_forward_pass(
    model: Decoder, make_engine: MakeEngine, tokenizer: Any, options: dict[str, int]
) -> None:
    out = make_engine(**options).generate(PROMPTS, Sampling(max_tokens=12, temperature=0, ignore_eos=True))
    for prompt, completion in zip(PROMPTS, out, strict=True):
        assert list(completion.tokens) == greedy(model, tokenizer.encode(prompt), 12)
        assert completion.stop_reason is StopReason.LENGTH
        assert completion.num_prompt_tokens == len(prompt)
        assert set(completion.logprobs) == {0.0}


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
        {"sliding_window": 5, "sliding_layers": (0,)},
        {"sliding_window": 9, "sliding_layers": (0, 1)},
        {"positions": "learned", "norm": "layer", "gated_mlp": False},
        {"qk_norm": "head"},
    ],
)
@pytest.mark.parametrize("prefill_tokens", [4096, 6])
def test_policy_logprobs_are_the_trainers(
    make_model: Callable[..., Decoder],
    make_engine: MakeEngine,
    tokenizer: Any,
    shape: dict[str, Any],
    prefill_tokens: int,
) -> None:
    model = make_model(1, **shape)
    engine = make_engine(model, max_batch=5, prefill_tokens=prefill_tokens)
    sampling = Sampling(max_tokens=24, temperature=0.8, top_p=0.9, n=2, seed=5, ignore_eos=True)
    out = engine.generate(PROMPTS, sampling)
    gaps = []
    for place, completion in enumerate(out):
        truth = forward_logprobs(model, tokenizer.encode(PROMPTS[place // 2]), completion)
        gaps.append((torch.tensor(completion.policy_logprobs) - truth).abs())
        assert all(
            own >= policy - 20 for own, policy in zip(completion.logprobs, completion.policy_logprobs, strict=True)
        )
    assert torch.cat(gaps).mean().item() <= 1e-5
    assert torch.cat(gaps).max().item() <= 1e-4


def test_untruncated_logprobs_at_temperature_1_are_the_policys(make_engine: MakeEngine) -> None:
    for completion in make_engine().generate(PROMPTS, Sampling(max_tokens=8, seed=1)):
        assert completion.logprobs == completion.policy_logprobs


def test_a_request_does_not_depend_on_its_batch_mates(make_engine: MakeEngine) -> None:
    settings = [
        Sampling(max_tokens=20, seed=1, n=2),
        Sampling(max_tokens=9, seed=2, temperature=0.5, top_k=5),
        Sampling(max_tokens=15, seed=3, top_p=0.7, n=3),
        Sampling(max_tokens=4, seed=4, temperature=0),
    ]
    crowd = make_engine(max_batch=3)
    handles = [crowd.submit(request(prompt, sampling)) for prompt, sampling in zip(PROMPTS, settings, strict=True)]
    together = [handle.result(60) for handle in handles]
    for options in ({"max_batch": 1}, {"max_batch": 16}, {"max_batch": 16, "prefill_tokens": 4}):
        engine = make_engine(**options)
        for prompt, sampling, theirs in zip(PROMPTS, settings, together, strict=True):
            same(engine.submit(request(prompt, sampling)).result(60), theirs)


def request(prompt: str, sampling: Sampling, name: str = "") -> Any:
    from posttrain.core import SampleRequest

    return SampleRequest(prompt=tuple(prompt.encode()), sampling=sampling, id=name)


def test_seeds_decide(make_engine: MakeEngine) -> None:
    engine = make_engine()
    one = engine.generate(PROMPTS, Sampling(max_tokens=10, seed=7, n=2))
    again = engine.generate(PROMPTS, Sampling(max_tokens=10, seed=7, n=2))
    other = engine.generate(PROMPTS, Sampling(max_tokens=10, seed=8, n=2))
    assert one == again
    assert [c.tokens for c in one] != [c.tokens for c in other]
    assert one[0].tokens != one[1].tokens  # siblings differ
    twice = engine.generate(["same", "same"], Sampling(max_tokens=10, seed=7))
    assert twice[0].tokens != twice[1].tokens  # and so do equal prompts of one call


def test_requests_without_a_seed_differ_but_follow_the_engines(make_engine: MakeEngine) -> None:
    first, second = make_engine(seed=3), make_engine(seed=3)
    sampling = Sampling(max_tokens=10)
    runs = [first.generate(["x"], sampling), first.generate(["x"], sampling)]
    assert runs[0][0].tokens != runs[1][0].tokens
    assert [run[0].tokens for run in runs] == [second.generate(["x"], sampling)[0].tokens for _ in range(2)]


def test_siblings_share_their_prompts_prefill(make_engine: MakeEngine) -> None:
    prompt = "a prompt of some length"
    for max_batch in (16, 3):  # also where not all siblings fit at once
        engine = make_engine(max_batch=max_batch)
        out = engine.generate([prompt], Sampling(max_tokens=6, n=10, seed=0))
        assert [completion.index for completion in out] == list(range(10))
        assert engine.stats().prefill_tokens_total == len(prompt)
        assert engine.stats().prompt_tokens_total == len(prompt)


def test_more_requests_than_slots_all_come_back(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch=4)
    prompts = [f"prompt {number}" for number in range(37)]
    few = engine.generate(prompts, Sampling(max_tokens=7, seed=1, n=2, ignore_eos=True))
    assert len(few) == 74
    assert engine.stats().generation_tokens_total == 74 * 7
    assert engine.stats().num_running == engine.stats().num_waiting == 0
    same(few, make_engine(max_batch=80).generate(prompts, Sampling(max_tokens=7, seed=1, n=2, ignore_eos=True)))


def test_end_of_sequence_ends_and_is_kept_as_a_token_only(make_engine: MakeEngine, tokenizer: Any) -> None:
    out = make_engine(max_batch=32).generate(["abc"], Sampling(max_tokens=200, n=32, seed=2))
    ended = [completion for completion in out if completion.stop_reason is StopReason.EOS]
    assert ended
    for completion in ended:
        assert completion.tokens[-1] == 256
        assert 256 not in completion.tokens[:-1]
        assert completion.text == tokenizer.decode(completion.tokens)
        assert len(completion.logprobs) == len(completion.policy_logprobs) == len(completion.tokens)
    ignoring = make_engine(max_batch=32).generate(["abc"], Sampling(max_tokens=200, n=32, seed=2, ignore_eos=True))
    assert all(len(completion.tokens) == 200 for completion in ignoring)


def test_stop_tokens_end_like_end_of_sequence(make_engine: MakeEngine, tokenizer: Any) -> None:
    free = make_engine().generate(["abc"], Sampling(max_tokens=30, seed=2, ignore_eos=True))[0]
    stop = free.tokens[9]
    first = free.tokens.index(stop)
    cut = make_engine().generate(["abc"], Sampling(max_tokens=30, seed=2, ignore_eos=True, stop_tokens=(stop,)))[0]
    assert cut.tokens == free.tokens[: first + 1]
    assert cut.stop_reason is StopReason.EOS
    assert cut.text == tokenizer.decode(free.tokens[:first])


def test_stop_strings_cut_the_text_and_keep_the_tokens(make_engine: MakeEngine, tokenizer: Any) -> None:
    sampling = Sampling(max_tokens=60, seed=4, ignore_eos=True)
    free = make_engine().generate(["abc"], sampling)[0]
    text = tokenizer.decode(free.tokens)
    plain = [place for place in range(5, len(text) - 1) if text[place : place + 2].isascii()]
    assert plain, "the random text has two plain characters in a row"
    stop = text[plain[0] : plain[0] + 2]
    cut = make_engine().generate(["abc"], sampling.replace(stop=(stop, "never seen")))[0]
    assert cut.stop_reason is StopReason.STOP
    assert cut.text == text[: text.index(stop)]
    assert cut.tokens == free.tokens[: len(cut.tokens)]
    assert stop in tokenizer.decode(cut.tokens)
    assert stop not in tokenizer.decode(cut.tokens[:-1])


def test_a_stop_string_that_is_a_special_token_stops_by_its_id(make_model: Any, make_engine: MakeEngine) -> None:
    model = make_model(0)
    with torch.no_grad():
        model.head.weight[257] = model.head.weight[97] * 0  # logit 0 for <x>: likely often enough
    out = make_engine(model, max_batch=32).generate(["q"], Sampling(max_tokens=150, n=32, seed=1, stop=("<x>",)))
    stopped = [completion for completion in out if completion.tokens[-1] == 257]
    assert stopped
    assert all(completion.stop_reason is StopReason.EOS for completion in stopped)
    assert all(257 not in completion.tokens[:-1] for completion in out)


def test_top_logprobs(make_engine: MakeEngine, model: Decoder) -> None:
    out = make_engine().generate(["abc"], Sampling(max_tokens=5, seed=1, top_logprobs=3, temperature=0.5))[0]
    plain = make_engine().generate(["abc"], Sampling(max_tokens=5, seed=1, temperature=0.5))[0]
    assert out.tokens == plain.tokens
    assert plain.top_logprobs == ()
    assert len(out.top_logprobs) == len(out.tokens)
    with torch.no_grad():
        truth = torch.log_softmax(model(torch.tensor([[97, 98, 99]]))[0, -1], -1).topk(3)
    assert list(out.top_logprobs[0]) == truth.indices.tolist()
    assert list(out.top_logprobs[0].values()) == pytest.approx(truth.values.tolist(), abs=1e-5)
    mixed = make_engine()
    handles = [mixed.submit(request("abc", Sampling(max_tokens=4, seed=1, top_logprobs=k))) for k in (0, 1, 5)]
    assert [[len(top) for top in handle.result(60)[0].top_logprobs] for handle in handles] == [[], [1] * 4, [5] * 4]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "said"),
    [
        ([97] * 30, 40, r"30 prompt tokens \+ max_tokens=40 = 70, more than the 64 of a cache slot"),
        ([97] * 64, 1, "larger max_length"),
        ([], 4, "empty prompt"),
        ([97, 258], 4, r"outside 0 … 257"),
        ([-1], 4, r"outside 0 … 257"),
    ],
)
def test_requests_that_cannot_be_are_refused(
    make_engine: MakeEngine, prompt: list[int], max_tokens: int, said: str
) -> None:
    engine = make_engine(max_length=64)
    with pytest.raises(EngineError, match=said):
        engine.generate([prompt], Sampling(max_tokens=max_tokens))
    assert len(engine.generate([[97] * 60], Sampling(max_tokens=4, ignore_eos=True))[0].tokens) == 4


def test_an_empty_prompt_becomes_the_beginning_of_sequence_where_there_is_one(
    make_model: Any, make_engine: MakeEngine
) -> None:
    engine = make_engine(make_model(0, bos_id=1))
    sampling = Sampling(max_tokens=4, temperature=0)
    assert engine.generate([""], sampling)[0].tokens == engine.generate([[1]], sampling)[0].tokens


@pytest.mark.parametrize("options", [{"max_length": 300}, {"max_length": 1}, {"max_batch": 0}, {"prefill_tokens": 0}])
def test_sizes_out_of_range_are_refused(make_engine: MakeEngine, options: dict[str, int]) -> None:
    with pytest.raises(EngineError, match=next(iter(options))):
        make_engine(**options)


def test_a_slot_is_used_to_its_last_position(make_engine: MakeEngine, model: Decoder) -> None:
    out = make_engine(max_length=32).generate([[97] * 20], Sampling(max_tokens=12, temperature=0, ignore_eos=True))[0]
    assert list(out.tokens) == greedy(model, [97] * 20, 12)


def test_bfloat16_copies_follow_the_policy_closely(make_engine: MakeEngine, model: Decoder, tokenizer: Any) -> None:
    out = make_engine(dtype=torch.bfloat16).generate(PROMPTS, Sampling(max_tokens=20, seed=1, ignore_eos=True))
    gaps = [
        (torch.tensor(completion.policy_logprobs) - forward_logprobs(model, tokenizer.encode(prompt), completion)).abs()
        for prompt, completion in zip(PROMPTS, out, strict=True)
    ]
    assert 0 < torch.cat(gaps).mean().item() < 0.05
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("poisoned", [200, 0])
def test_a_row_with_nan_fails_alone(make_model: Any, make_engine: MakeEngine, poisoned: int) -> None:
    model = make_model(0)
    with torch.no_grad():
        model.embed.weight[poisoned] = math.nan
    engine = make_engine(model, max_batch=4)
    prompts = [[97, 98], [97, poisoned, 98], [99], [poisoned], [100, 101, 102]]
    sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
    out = engine.generate(prompts, sampling)
    assert [completion.stop_reason is StopReason.ERROR for completion in out] == [False, True, False, True, False]
    assert "NaN" in (out[1].error or "")
    assert out[1].tokens == ()
    clean = make_engine(make_model(0)).generate(prompts, sampling)
    for place in (0, 2, 4):
        assert out[place].tokens == clean[place].tokens
    # The slots that held NaN serve again, to their full length.
    again = engine.generate([[97, 98]] * 8, sampling)
    assert all(completion.tokens == clean[0].tokens for completion in again)


def test_a_forward_pass_that_raises_fails_its_requests_and_the_engine_goes_on(
    model: Decoder, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    good = engine.generate(["ab"], Sampling(max_tokens=3, seed=1))

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", broken)
        failed = engine.generate(["ab", "cd"], Sampling(max_tokens=3, n=2))
    assert [completion.stop_reason for completion in failed] == [StopReason.ERROR] * 4
    assert all("out of memory" in (completion.error or "") for completion in failed)
    assert engine.generate(["ab"], Sampling(max_tokens=3, seed=1)) == good


def test_stats_count_what_happens(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch=4, max_length=50)
    assert engine.stats().num_slots == 4
    assert engine.stats().kv_usage == 0.0
    engine.generate(["abcd"], Sampling(max_tokens=5, n=2, ignore_eos=True))
    stats = engine.stats()
    assert stats.prompt_tokens_total == stats.prefill_tokens_total == 4
    assert stats.generation_tokens_total == 10
    assert stats.num_steps == 5 or stats.num_steps == 4
    assert stats.kv_usage == 0.0
