"""LocalEngine while it runs: streaming, cancelling, deadlines, admissions, weight swaps, kept prefixes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from posttrain.core import Completion, EngineError, SampleRequest, Sampling, StopReason
from posttrain.engine import LocalEngine, StreamEvent
from posttrain.models import Decoder

MakeEngine = Callable[..., LocalEngine]
LONG = Sampling(max_tokens=240, seed=1, ignore_eos=True)


def ask(text: str, sampling: Sampling, name: str = "") -> SampleRequest:
    return SampleRequest(prompt=tuple(text.encode()), sampling=sampling, id=name)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for another thread's doing."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.002)


class Slow:
    """A decoder whose every pass waits for a ticket, so that a test decides when steps happen."""

    def __init__(self, model: Decoder) -> None:
        self.tickets = threading.Semaphore(0)
        self.num_passes = 0
        plain = model.hidden

        def hidden(*args: Any, **options: Any) -> Any:
            self.tickets.acquire()
            self.num_passes += 1
            return plain(*args, **options)

        model.hidden = hidden  # type: ignore[method-assign]

    def go(self, passes: int) -> None:
        self.tickets.release(passes)


async def collect(engine: LocalEngine, request: SampleRequest) -> list[StreamEvent]:
    return [event async for event in engine.stream(request)]


def test_a_stream_adds_up_to_its_completions(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch=2)
    sampling = Sampling(max_tokens=40, seed=3, n=3, temperature=1.0, top_logprobs=1, stop=("zz",))
    events = asyncio.run(collect(engine, ask("hello", sampling)))
    (whole,) = asyncio.run(engine.sample([ask("hello", sampling)]))
    for index, completion in enumerate(whole):
        mine = [event for event in events if event.index == index]
        assert [event.completion for event in mine[:-1]] == [None] * (len(mine) - 1)
        last = mine[-1].completion
        assert last is not None
        assert last == completion
        assert "".join(event.text for event in mine) == completion.text
        for name in ("tokens", "logprobs", "policy_logprobs", "top_logprobs"):
            assert tuple(item for event in mine for item in getattr(event, name)) == getattr(completion, name)


def test_many_streams_and_samples_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch=4)
    sampling = Sampling(max_tokens=12, ignore_eos=True)

    async def run() -> tuple[list[list[StreamEvent]], list[list[list[Completion]]]]:
        streams = [collect(engine, ask(f"stream {i}", sampling.replace(seed=i))) for i in range(9)]
        samples = [engine.sample([ask(f"sample {i}", sampling.replace(seed=i, n=2))]) for i in range(9)]
        return await asyncio.gather(asyncio.gather(*streams), asyncio.gather(*samples))

    streams, samples = asyncio.run(run())
    assert all(sum(len(event.tokens) for event in events) == 12 for events in streams)
    assert all(len(completion.tokens) == 12 for (pair,) in samples for completion in pair)


def test_concurrent_samples_of_one_moment_start_together_and_repeat(make_engine: MakeEngine) -> None:
    async def run(engine: LocalEngine) -> list[list[list[Completion]]]:
        calls = [engine.sample([ask(f"task {i}", Sampling(max_tokens=9, seed=i))]) for i in range(6)]
        return await asyncio.gather(*calls)

    engine = make_engine(max_batch=8)
    first = asyncio.run(run(engine))
    assert engine.stats().num_steps <= 10
    assert asyncio.run(run(engine)) == first


def test_closing_a_stream_frees_its_slots(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch=2)

    async def run() -> None:
        stream = engine.stream(ask("x", LONG.replace(n=2)))
        async for _ in stream:
            break
        await stream.aclose()
        (after,) = await engine.sample([ask("y", Sampling(max_tokens=3, n=2, ignore_eos=True))])
        assert [len(completion.tokens) for completion in after] == [3, 3]

    asyncio.run(run())
    assert engine.stats().generation_tokens_total < 2 * LONG.max_tokens + 6


def test_cancelling_a_request_gives_what_was_written(make_model: Any, make_engine: MakeEngine) -> None:
    model = make_model(0)
    slow = Slow(model)
    engine = make_engine(model, max_batch=2)
    running = engine.submit(ask("x", LONG.replace(n=2), "running"))
    waiting = engine.submit(ask("y", LONG, "waiting"))
    slow.go(4)
    until(lambda: slow.num_passes == 4, "four passes")
    waiting.cancel()
    running.cancel()
    slow.go(1)
    assert [c.stop_reason for c in waiting.result(20)] == [StopReason.CANCELLED]
    assert waiting.result(20)[0].tokens == ()
    assert [c.stop_reason for c in running.result(20)] == [StopReason.CANCELLED] * 2
    assert all(1 <= len(completion.tokens) <= 6 for completion in running.result(20))
    until(lambda: engine.stats().num_running == 0, "freeing the slots")
    slow.go(1000)


def test_cancelling_one_request_does_not_touch_another(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch=3)
    alone = engine.submit(ask("keep", LONG)).result(60)
    doomed = engine.submit(ask("drop", LONG.replace(n=2)))
    kept = engine.submit(ask("keep", LONG))
    doomed.cancel()
    assert kept.result(60)[0].tokens == alone[0].tokens


def test_cancelling_the_caller_withdraws_its_requests(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch=1)

    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.sample([ask("x", LONG.replace(n=50))]), 0.05)
        (out,) = await engine.sample([ask("x", Sampling(max_tokens=2, ignore_eos=True))])
        assert len(out[0].tokens) == 2

    asyncio.run(run())
    assert engine.stats().num_waiting == 0


def test_a_deadline_ends_running_and_waiting_requests(make_model: Any, make_engine: MakeEngine) -> None:
    model = make_model(0)
    slow = Slow(model)
    engine = make_engine(model, max_batch=1)
    running = engine.submit(ask("x", LONG), timeout_s=0.15)
    waiting = engine.submit(ask("y", LONG), timeout_s=0.15)
    patient = engine.submit(ask("z", Sampling(max_tokens=2, ignore_eos=True)))
    slow.go(3)
    time.sleep(0.2)
    slow.go(20)
    (first,), (second,) = running.result(20), waiting.result(20)
    assert first.stop_reason is second.stop_reason is StopReason.TIMEOUT
    assert "0.15 s" in (first.error or "")
    assert len(first.tokens) >= 3
    assert second.tokens == ()
    assert len(patient.result(20)[0].tokens) == 2


def test_short_requests_pass_a_long_prompt_that_is_being_read(make_model: Any, make_engine: MakeEngine) -> None:
    model = make_model(0)
    engine = make_engine(model, max_batch=4, prefill_tokens=8)
    slow = Slow(model)
    long = engine.submit(ask("p" * 120, Sampling(max_tokens=2, ignore_eos=True)))
    short = engine.submit(ask("q", Sampling(max_tokens=3, ignore_eos=True)))
    slow.go(10)  # the long prompt alone takes at least 15 passes
    assert len(short.result(20)[0].tokens) == 3
    assert not long.done
    slow.go(1000)
    assert len(long.result(20)[0].tokens) == 2


def test_new_requests_join_while_others_run(make_model: Any, make_engine: MakeEngine) -> None:
    model = make_model(0)
    slow = Slow(model)
    engine = make_engine(model, max_batch=4)
    long = engine.submit(ask("x", LONG))
    slow.go(10)
    until(lambda: slow.num_passes == 10, "ten passes")
    late = engine.submit(ask("y", Sampling(max_tokens=3, ignore_eos=True)))
    slow.go(6)
    assert len(late.result(20)[0].tokens) == 3
    assert not long.done
    slow.go(1000)
    long.result(20)


def test_new_weights_change_what_is_sampled_and_what_is_recorded(make_model: Any, make_engine: MakeEngine) -> None:
    old, new = make_model(0), make_model(1)
    sampling = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    want_old = make_engine(old).generate(["abc"], sampling)[0].tokens
    want_new = make_engine(new).generate(["abc"], sampling)[0].tokens
    assert want_old != want_new
    engine = make_engine(old)
    assert engine.generate(["abc"], sampling)[0].tokens == want_old
    engine.update_weights(new, 5)
    out = engine.generate(["abc"], sampling)[0]
    assert (out.tokens, out.weight_version, out.last_weight_version) == (want_new, 5, 5)
    assert engine.stats().weight_version == engine.weight_version == 5


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_weights_come_from_tensors_or_from_a_changed_module(
    make_model: Any, make_engine: MakeEngine, dtype: Any
) -> None:
    old, new = make_model(0), make_model(1)
    sampling = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    want = make_engine(make_model(1), dtype=dtype).generate(["abc"], sampling)[0].tokens
    engine = make_engine(old, dtype=dtype)
    engine.generate(["abc"], sampling)
    if dtype is None:
        with torch.no_grad():
            for ours, theirs in zip(old.parameters(), new.parameters(), strict=True):
                ours.copy_(theirs)
        engine.update_weights(None, 1)
    else:
        with pytest.raises(EngineError, match="copy of the weights"):
            engine.update_weights(None, 1)
        engine.update_weights(dict(new.named_parameters()), 1)
    out = engine.generate(["abc"], sampling)[0]
    assert (out.tokens, out.weight_version) == (want, 1)


def test_wrong_tensors_are_refused_and_nothing_changes(make_model: Any, make_engine: MakeEngine) -> None:
    engine = make_engine(make_model(0), dtype=torch.float32)
    before = engine.generate(["abc"], Sampling(max_tokens=4, temperature=0))
    with pytest.raises(EngineError, match="no parameter 'nonsense'"):
        engine.update_weights({"nonsense": torch.zeros(1)}, 1)
    with pytest.raises(EngineError, match=r"'embed.weight' has shape \(3,\)"):
        engine.update_weights({"embed.weight": torch.zeros(3)}, 1)
    assert engine.generate(["abc"], Sampling(max_tokens=4, temperature=0)) == before


def test_a_swap_in_mid_generation_takes_effect_at_the_next_step(make_model: Any, make_engine: MakeEngine) -> None:
    old, new = make_model(0), make_model(1)
    slow = Slow(old)
    engine = make_engine(old, max_batch=2)
    sampling = Sampling(max_tokens=12, temperature=0, ignore_eos=True, n=3)
    handle = engine.submit(ask("abc", sampling))
    slow.go(4)
    until(lambda: slow.num_passes == 4, "four passes")
    swap = threading.Thread(target=engine.update_weights, args=(new, 9))
    swap.start()
    time.sleep(0.05)
    slow.go(1)
    swap.join(20)
    first, second, third = handle.result(20)
    slow.go(1000)
    want_old = make_engine(make_model(0)).generate(["abc"], sampling.replace(n=1))[0].tokens
    want_new = make_engine(make_model(1)).generate(["abc"], sampling.replace(n=1))[0].tokens
    for mixed in (first, second):
        assert (mixed.weight_version, mixed.last_weight_version) == (0, 9)
        assert mixed.tokens[:4] == want_old[:4]
        assert mixed.tokens != want_old
    # The third had not started: its prompt is read again, so it is wholly the new model's.
    assert (third.weight_version, third.last_weight_version) == (9, 9)
    assert third.tokens == want_new


def test_a_next_turn_reads_only_what_is_new(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_tokens=500)
    sampling = Sampling(max_tokens=20, seed=1, ignore_eos=True)
    turn = list(b"A conversation opens with a long enough first turn.")
    first = engine.generate([turn], sampling)[0]
    following = [*turn, *first.tokens, *b" and goes on"]
    computed = engine.stats().prefill_tokens_total
    second = engine.generate([following], sampling)[0]
    stats = engine.stats()
    assert stats.prefix_hits == 1
    # Everything but the last sampled token was cached.
    assert stats.prefix_hit_tokens == len(turn) + 19
    assert stats.prefill_tokens_total - computed == len(following) - len(turn) - 19
    fresh = make_engine().generate([following], sampling)[0]
    assert second.tokens == fresh.tokens
    assert second.policy_logprobs == pytest.approx(fresh.policy_logprobs, abs=1e-4)


def test_prefixes_of_different_lengths_are_continued_in_one_batch(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_tokens=2000, max_batch=8)
    sampling = Sampling(max_tokens=6, seed=1, ignore_eos=True)
    turns = [list(b"s" * 20 + bytes([65 + i]) * (5 * i + 3)) for i in range(4)]
    first = engine.generate(turns, sampling)
    following = [[*t, *c.tokens, *b"more" * (i + 1)] for i, (t, c) in enumerate(zip(turns, first, strict=True))]
    second = engine.generate(following, sampling)
    assert engine.stats().prefix_hits >= 4
    fresh = make_engine().generate(following, sampling)
    assert [completion.tokens for completion in second] == [completion.tokens for completion in fresh]


def test_kept_prefixes_are_forgotten_with_their_weights(make_model: Any, make_engine: MakeEngine) -> None:
    engine = make_engine(make_model(0), prefix_tokens=500)
    sampling = Sampling(max_tokens=5, temperature=0, ignore_eos=True)
    prompt = [list(b"a prompt of more than sixteen tokens")]
    engine.generate(prompt, sampling)
    engine.update_weights(make_model(1), 1)
    out = engine.generate(prompt, sampling)
    assert engine.stats().prefix_hits == 0
    assert out[0].tokens == make_engine(make_model(1)).generate(prompt, sampling)[0].tokens


def test_kept_prefixes_stay_within_their_capacity(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_tokens=100)
    for number in range(6):
        engine.generate([list(f"prompt {number} ".encode() * 4)], Sampling(max_tokens=4, ignore_eos=True))
    assert 0 < engine._stepper.prefixes.num_tokens <= 100


def test_closing_ends_what_is_unfinished_and_refuses_what_is_new(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch=1)
    handles = [engine.submit(ask("x", LONG)) for _ in range(3)]
    engine.close()
    engine.close()
    assert {handle.result(5)[0].stop_reason for handle in handles} <= {StopReason.CANCELLED, StopReason.LENGTH}
    assert handles[-1].result(5)[0].stop_reason is StopReason.CANCELLED
    with pytest.raises(EngineError, match="closed"):
        engine.generate(["x"], LONG)


def test_the_thread_ends_when_idle_and_starts_again(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.engine.local._IDLE_S", 0.05)
    engine = make_engine()
    first = engine.generate(["x"], Sampling(max_tokens=3, seed=1))
    until(lambda: engine._thread is None, "the thread's end")
    assert engine.generate(["x"], Sampling(max_tokens=3, seed=1)) == first


def test_a_result_that_does_not_come_in_time_says_so(make_model: Any, make_engine: MakeEngine) -> None:
    model = make_model(0)
    slow = Slow(model)
    handle = make_engine(model).submit(ask("x", Sampling(max_tokens=1), "late"))
    with pytest.raises(EngineError, match=r"'late' is not finished after 0\.05 s"):
        handle.result(0.05)
    slow.go(10)
    assert len(handle.result(20)) == 1


def test_a_program_that_forgets_to_close_its_engine_ends_in_good_order(tmp_path: Any) -> None:
    script = tmp_path / "forgetful.py"
    script.write_text(
        "from posttrain import models, engine\n"
        "from posttrain.core import SampleRequest, Sampling\n"
        "class Tokenizer:\n"
        "    vocab_size, eos_ids = 50, frozenset()\n"
        "    def decode(self, tokens, *, skip_special_tokens=True): return ''\n"
        "shape = dict(vocab_size=50, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32)\n"
        "model = models.Decoder.random(models.DecoderConfig(**shape, max_positions=256))\n"
        "local = engine.LocalEngine(model, Tokenizer())\n"
        "local.submit(SampleRequest(prompt=(1,), sampling=Sampling(max_tokens=255, n=5000)))\n"
        "print('main is over')\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "main is over\n", "")
