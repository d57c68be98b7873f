"""Chat over an engine or over a server: messages in, the assistant's message out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from posttrain.core import (
    EngineError,
    Message,
    SampleRequest,
    SampleTokens,
    Sampling,
    StopReason,
    ToolCall,
    assistant,
    derive_seed,
)
from posttrain.engine.http import JsonClient, RemoteFailure

_FAILED = (StopReason.ERROR, StopReason.TIMEOUT, StopReason.CANCELLED)


class HasTokens(Protocol):
    """A rendered conversation."""

    @property
    def tokens(self) -> Sequence[int]:
        """Token ids."""
        ...


class RendersMessages(Protocol):
    """What a chat needs of a renderer. `posttrain.render.Renderer` is one."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> HasTokens:
        """The conversation as tokens, ending with the header of an assistant's turn."""
        ...


@runtime_checkable
class NamesStopTokens(Protocol):
    """A renderer that knows which tokens end an assistant's turn."""

    @property
    def stop_tokens(self) -> Iterable[int]:
        """Token ids."""
        ...


class EngineChat:
    """A sampler and a chat template as a `Chat`."""

    def __init__(self, engine: SampleTokens, renderer: RendersMessages) -> None:
        self.engine, self.renderer = engine, renderer

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Message:
        """The first completion's text as an assistant's message.

        Raises:
            EngineError: sampling failed.
        """
        tokens = tuple(self.renderer.render(messages, add_generation_prompt=True).tokens)
        if isinstance(self.renderer, NamesStopTokens):
            ends = {*sampling.stop_tokens, *self.renderer.stop_tokens}
            sampling = sampling.replace(stop_tokens=tuple(sorted(ends)))
        request = SampleRequest(prompt=tokens, sampling=sampling.replace(n=1), id="chat")
        ((completion,),) = await self.engine.sample([request])
        if completion.stop_reason in _FAILED:
            raise EngineError(f"chat failed ({completion.stop_reason}): {completion.error or 'no cause given'}")
        return assistant(completion.text)


class RemoteChat:
    """A server's /v1/chat/completions as a `Chat`: a judge, a teacher, a simulated user."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 300.0,
        max_concurrency: int = 32,
        retries: int = 4,
        transport: Any = None,
    ) -> None:
        """Take the server's address; arguments as for `RemoteEngine`."""
        self.model = model
        self._refuses_schemas = False
        self._client = JsonClient(
            url,
            api_key=api_key,
            timeout_s=timeout_s,
            retries=retries,
            max_concurrency=max_concurrency,
            transport=transport,
        )

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Message:
        """The first choice's message.

        Raises:
            EngineError: the server refused, could not be reached, or its reply is no message.
        """
        message, _ = await self.chat_structured(messages, sampling, None)
        return message

    async def chat_structured(
        self, messages: Sequence[Message], sampling: Sampling, schema: Mapping[str, Any] | None
    ) -> tuple[Message, dict[str, int]]:
        """The first choice's message, written to a JSON schema where the server can do that, and what it used.

        A server that refuses `response_format` is asked again without it, and from then on only so: the caller checks
        the reply in any case.

        Args:
            messages: the conversation.
            sampling: how to sample.
            schema: a JSON schema of the reply; None: free text.

        Returns:
            The message, and `prompt_tokens` and `completion_tokens` where the server tells them.

        Raises:
            EngineError: as for `chat`.
        """
        body = self._body(messages, sampling)
        if schema is None or self._refuses_schemas:
            return await self._ask(body)
        wanted = {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": dict(schema)}}
        try:
            return await self._ask({**body, "response_format": wanted})
        except RemoteFailure as failure:
            if failure.status not in (400, 422, 501):
                raise
        answer = await self._ask(body)
        self._refuses_schemas = True  # only now is it sure that the format was what it refused
        return answer

    async def _ask(self, body: dict[str, Any]) -> tuple[Message, dict[str, int]]:
        reply = await self._client.post("/chat/completions", body)
        try:
            used = reply.get("usage") or {}
            counts = {name: int(used[name]) for name in ("prompt_tokens", "completion_tokens") if used.get(name)}
            return _read_message(reply["choices"][0]["message"]), counts
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise RemoteFailure(f"{self._client.url}: the reply is not a chat completion: {error!r}") from error

    def _body(self, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [_wire_message(message) for message in messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        extra = {"top_k": sampling.top_k, "min_p": sampling.min_p, "stop": list(sampling.stop)}
        body |= {name: value for name, value in extra.items() if value}
        if sampling.seed is not None:
            body["seed"] = derive_seed(sampling.seed, "remote") >> 32
        return body

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def _wire_message(message: Message) -> dict[str, Any]:
    """OpenAI's form of a message."""
    wire: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        wire["tool_calls"] = [
            {
                "id": call.id or f"call_{place}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for place, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        wire["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        wire["name"] = message.name
    return wire


def _read_message(wire: dict[str, Any]) -> Message:
    calls = [
        ToolCall(
            name=call["function"]["name"],
            arguments=json.loads(call["function"].get("arguments") or "{}"),
            id=call.get("id"),
        )
        for call in wire.get("tool_calls") or ()
    ]
    return Message(
        role="assistant",
        content=wire.get("content") or "",
        reasoning=wire.get("reasoning_content") or wire.get("reasoning"),
        tool_calls=tuple(calls),
    )
