"""An inline engine computes in the thread that asks, and gives what the other gives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from posttrain import models
from posttrain.core import Completion, SampleRequest, Sampling
from posttrain.engine import LocalEngine

MakeEngine = Callable[..., LocalEngine]
HOW = Sampling(max_tokens=12, n=3, seed=5, ignore_eos=True)
PROMPTS = [(1, 2, 3), (4, 5), (6, 7, 8, 9, 10), (11,)]


def _engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "posttrain-engine"]


def _tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in completions]


def test_inline_gives_the_same_and_starts_no_thread(make_engine: MakeEngine) -> None:
    own, inline = make_engine(), make_engine(inline=True)
    before = len(_engine_threads())
    ours = inline.generate(PROMPTS, HOW)
    assert len(_engine_threads()) == before
    assert _tokens(ours) == _tokens(own.generate(PROMPTS, HOW))
    assert [c.logprobs for c in ours] == [c.logprobs for c in own.generate(PROMPTS, HOW)]


def test_inline_samples_for_several_callers_of_one_event_loop(make_engine: MakeEngine) -> None:
    own, inline = make_engine(), make_engine(inline=True)
    requests = [SampleRequest(prompt=prompt, sampling=HOW.replace(seed=7 + i)) for i, prompt in enumerate(PROMPTS)]

    async def both(engine: LocalEngine) -> list[list[list[Completion]]]:
        return list(await asyncio.gather(engine.sample(requests[:2]), engine.sample(requests[2:])))

    found, expected = asyncio.run(both(inline)), asyncio.run(both(own))
    assert [[_tokens(c) for c in part] for part in found] == [[_tokens(c) for c in part] for part in expected]


def test_inline_takes_new_weights(make_engine: MakeEngine, make_model: Callable[..., models.Decoder]) -> None:
    engine = make_engine(inline=True)
    before = engine.generate(PROMPTS, HOW)
    engine.update_weights(make_model(seed=9), version=4)
    after = engine.generate(PROMPTS, HOW)
    assert {completion.weight_version for completion in after} == {4}
    assert _tokens(before) != _tokens(after)


def test_threads_that_ask_at_the_same_time_are_all_answered(make_engine: MakeEngine) -> None:
    engine = make_engine(inline=True)
    expected = [_tokens(engine.generate([prompt], HOW)) for prompt in PROMPTS]
    found: dict[int, list[tuple[int, ...]]] = {}

    def ask(place: int) -> None:
        found[place] = _tokens(engine.generate([PROMPTS[place]], HOW))

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert [found.get(place) for place in range(len(PROMPTS))] == expected
