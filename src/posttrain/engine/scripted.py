"""ScriptedEngine: a sampler that answers what it was told to. For tests and for dry runs of recipes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from posttrain.core import Completion, EngineError, SampleRequest, StopReason, TextTokenizer, generator

Answers = Mapping[str | tuple[int, ...], str | Sequence[str]] | Callable[[SampleRequest], str | Sequence[str]]


class ScriptedEngine:
    """Gives scripted texts as completions with exact tokens. Implements `SampleTokens`; every request is kept.

    Attributes:
        requests: all requests seen, in order.
        weight_version: recorded in completions; set it to act out a weight update.
    """

    def __init__(
        self,
        answers: Answers,
        tokenizer: TextTokenizer,
        *,
        latency_s: float = 0.0,
        fail: Callable[[SampleRequest, int], str | None] | None = None,
    ) -> None:
        """Take the script.

        Args:
            answers: text by prompt (its text or its token ids), or a function of the request. Several texts are the
                siblings' in turn, from the first again where n is larger.
            tokenizer: turns texts into tokens; an end-of-sequence id is appended if it has one.
            latency_s: how long every request takes.
            fail: given a request and a sibling's index, an error text to fail with, or None.
        """
        self.requests: list[SampleRequest] = []
        self.weight_version = 0
        self._answers, self._tokenizer = answers, tokenizer
        self._latency_s, self._fail = latency_s, fail

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        """The script's completions, n per request.

        Raises:
            EngineError: the script has no answer to a prompt.
        """
        self.requests.extend(requests)
        if self._latency_s > 0:
            await asyncio.sleep(self._latency_s)
        return [[self._complete(request, index) for index in range(request.sampling.n)] for request in requests]

    def _complete(self, request: SampleRequest, index: int) -> Completion:
        error = None if self._fail is None else self._fail(request, index)
        text = "" if error is not None else self._text(request, index)
        reason = StopReason.EOS if error is None else StopReason.ERROR
        tokens: list[int] = []
        if error is None:
            tokens = self._tokenizer.encode(text) + sorted(self._tokenizer.eos_ids)[:1]
            if len(tokens) > request.sampling.max_tokens:
                tokens, reason = tokens[: request.sampling.max_tokens], StopReason.LENGTH
                text = self._tokenizer.decode(tokens)
            elif not self._tokenizer.eos_ids:
                reason = StopReason.STOP
        # Made up, but the same for the same request: between -2 and 0.
        draw = generator(request.sampling.seed or 0, "scripted", index)
        logprobs = tuple(-2.0 * draw.random() for _ in tokens)
        return Completion(
            tokens=tuple(tokens),
            logprobs=logprobs,
            policy_logprobs=logprobs,
            text=text,
            stop_reason=reason,
            index=index,
            request_id=request.id,
            weight_version=self.weight_version,
            last_weight_version=self.weight_version,
            num_prompt_tokens=len(request.prompt),
            error=error,
        )

    def _text(self, request: SampleRequest, index: int) -> str:
        if callable(self._answers):
            answer = self._answers(request)
        else:
            prompt = self._tokenizer.decode(request.prompt, skip_special_tokens=False)
            found = self._answers.get(request.prompt, self._answers.get(prompt))
            if found is None:
                known = ", ".join(repr(key) for key in list(self._answers)[:3])
                raise EngineError(f"the script has no answer to {prompt!r}; it begins with {known}")
            answer = found
        return answer if isinstance(answer, str) else answer[index % len(answer)]
