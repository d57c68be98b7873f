"""RemoteEngine: a server that speaks OpenAI's /v1/completions as a sampler."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from posttrain.core import Completion, EngineError, SampleRequest, Sampling, StopReason, TextTokenizer, derive_seed
from posttrain.engine.http import JsonClient, RemoteFailure


class RemoteEngine:
    """Samples from a server. Implements `SampleTokens`; what fails becomes a completion with StopReason.ERROR.

    Servers that return token ids (vLLM and `posttrain serve`, asked by `return_token_ids`) give exact tokens. From
    others the text is encoded again, which may not be what was sampled. A logprob that the server does not tell is NaN,
    so that a trainer fails rather than learns from a wrong one: all of them without token ids, and `logprobs` where
    temperature or truncation change the distribution, because servers report the model's own. Top-k, min-p, ignore_eos
    and stop tokens are sent under vLLM's names, where they are used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        tokenizer: TextTokenizer,
        api_key: str | None = None,
        timeout_s: float = 300.0,
        max_concurrency: int = 64,
        retries: int = 4,
        transport: Any = None,
    ) -> None:
        """Take the server's address.

        Args:
            url: with or without "/v1".
            model: the server's name of the model.
            tokenizer: the model's.
            api_key: sent as a bearer token.
            timeout_s: per attempt.
            max_concurrency: requests in flight.
            retries: further attempts after 408, 409, 429, 5xx and broken connections, waiting as Retry-After says
                or twice as long each time.
            transport: an httpx transport, for tests.
        """
        self.model, self.tokenizer = model, tokenizer
        self._client = JsonClient(
            url,
            api_key=api_key,
            timeout_s=timeout_s,
            retries=retries,
            max_concurrency=max_concurrency,
            transport=transport,
        )

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        """For each request its completions, by index."""
        return list(await asyncio.gather(*(self._one(request) for request in requests)))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _one(self, request: SampleRequest) -> list[Completion]:
        if not request.prompt:
            raise EngineError(f"request {request.id!r} has an empty prompt")
        try:
            reply = await self._client.post("/completions", self._body(request))
            choices = sorted(reply["choices"], key=lambda choice: choice.get("index", 0))
            completions = [self._read(request, choice, index) for index, choice in enumerate(choices)]
        except RemoteFailure as failure:
            return self._failed(request, failure.reason, str(failure))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            return self._failed(request, StopReason.ERROR, f"the server's reply is not a completion: {error!r}")
        if len(completions) != request.sampling.n:
            count = f"{len(completions)} completions instead of {request.sampling.n}"
            return self._failed(request, StopReason.ERROR, f"the server gave {count}")
        return completions

    def _body(self, request: SampleRequest) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(request.prompt),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "n": sampling.n,
            "logprobs": sampling.top_logprobs,
            "return_token_ids": True,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "ignore_eos": sampling.ignore_eos,
            "stop_token_ids": list(sampling.stop_tokens),
            "stop": list(sampling.stop),
        }
        # Only what differs from every server's default: strict ones refuse fields they do not know.
        defaults = {"top_k": 0, "min_p": 0.0, "ignore_eos": False, "stop_token_ids": [], "stop": []}
        body = {name: value for name, value in body.items() if name not in defaults or value != defaults[name]}
        if sampling.seed is not None:
            body["seed"] = derive_seed(sampling.seed, "remote") >> 32  # servers take 31 bits
        return body

    def _read(self, request: SampleRequest, choice: dict[str, Any], index: int) -> Completion:
        sampling = request.sampling
        text: str = choice["text"]
        exact = choice.get("token_ids") is not None
        tokens = [int(token) for token in choice["token_ids"]] if exact else self.tokenizer.encode(text)
        details = choice.get("logprobs") or {}
        told = [float(value) for value in details.get("token_logprobs") or ()]
        unknown = (math.nan,) * len(tokens)
        policy_logprobs = tuple(told) if exact and len(told) == len(tokens) else unknown
        logprobs = unknown
        if sampling.temperature == 0:
            logprobs = (0.0,) * len(tokens)
        elif sampling.temperature == 1 and sampling.top_p == 1 and sampling.top_k == 0 and sampling.min_p == 0:
            logprobs = policy_logprobs
        return Completion(
            tokens=tuple(tokens),
            logprobs=logprobs,
            policy_logprobs=policy_logprobs,
            text=text,
            stop_reason=_stop_reason(choice, tokens, sampling, self.tokenizer),
            index=index,
            request_id=request.id,
            num_prompt_tokens=len(request.prompt),
        )

    def _failed(self, request: SampleRequest, reason: StopReason, error: str) -> list[Completion]:
        return [
            Completion(
                tokens=(),
                logprobs=(),
                policy_logprobs=(),
                text="",
                stop_reason=reason,
                index=index,
                request_id=request.id,
                num_prompt_tokens=len(request.prompt),
                error=error,
            )
            for index in range(request.sampling.n)
        ]


def _stop_reason(
    choice: dict[str, Any], tokens: Sequence[int], sampling: Sampling, tokenizer: TextTokenizer
) -> StopReason:
    reason = choice.get("finish_reason")
    if reason == "length":
        return StopReason.LENGTH
    if reason != "stop":
        raise ValueError(f"finish_reason {reason!r}")
    # vLLM names the stop string in stop_reason; others leave only the tokens to tell.
    if isinstance(choice.get("stop_reason"), str):
        return StopReason.STOP
    at_end_token = bool(tokens) and (tokens[-1] in tokenizer.eos_ids or tokens[-1] in sampling.stop_tokens)
    return StopReason.STOP if sampling.stop and not at_end_token else StopReason.EOS
