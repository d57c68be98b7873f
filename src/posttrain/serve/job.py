"""From a checked request to something that can be sampled: prompts, sampling, and how to write the answer."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from posttrain.core import ConfigError, Message, PosttrainError, Sampling, StopReason, ToolCall, ToolSpec
from posttrain.serve.api_error import bad_request
from posttrain.serve.generation import Generation
from posttrain.serve.model import ParsesAnswers, ServedModel
from posttrain.serve.state import ServeSettings
from posttrain.serve.wire import ChatRequest, CompletionRequest, Generate, WireMessage, WireToolCall

MAX_STOP = 16


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request in work."""

    kind: Literal["chat", "text"]
    generation: Generation
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None  # None: no logprobs asked for
    return_token_ids: bool = False
    messages: tuple[Message, ...] | None = None
    tools: tuple[ToolSpec, ...] = ()
    user: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def parses(self) -> bool:
        """True where the answer is read for tool calls, and so is told only when whole."""
        return bool(self.tools)

    def finish_reason(self, choice: int) -> str:
        """OpenAI's word for why a choice ended."""
        ended = self.generation.choices[choice]
        if ended.response is not None and ended.response.tool_calls:
            return "tool_calls"
        return "length" if ended.stop_reason is StopReason.LENGTH else "stop"


async def chat_job(request: ChatRequest, model: ServedModel, settings: ServeSettings, metadata: dict[str, Any]) -> Job:
    """Prepare a chat request.

    Raises:
        ApiError: 400, naming the field.
    """
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise bad_request("give max_tokens or max_completion_tokens, not both", "max_tokens")
    if request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    messages = tuple(_message(turn, f"messages[{number}]") for number, turn in enumerate(request.messages))
    tools = () if request.tool_choice == "none" else _tools(request, model)
    prompt = await _render(model, messages, tools, "messages")
    wanted = request.max_completion_tokens or request.max_tokens
    top = (request.top_logprobs or 0) if request.logprobs else None
    generation = _generation("chatcmpl", request, model, [prompt], wanted, top, settings)
    if tools:
        plain = [{"type": "function", "function": msgspec.to_builtins(tool)} for tool in tools]
        metadata = {**metadata, "tools": plain}
    return Job(
        kind="chat",
        generation=generation,
        top_logprobs=top,
        messages=messages,
        tools=tools,
        metadata=metadata,
        **_manner(request),
    )


async def text_job(
    request: CompletionRequest, model: ServedModel, settings: ServeSettings, metadata: dict[str, Any]
) -> Job:
    """Prepare a plain-text request.

    Raises:
        ApiError: 400, naming the field.
    """
    prompts = await _prompts(request, model, settings)
    generation = _generation(
        "cmpl",
        request,
        model,
        prompts,
        request.max_tokens or 16,
        request.logprobs,
        settings,  # OpenAI's default
    )
    return Job(kind="text", generation=generation, top_logprobs=request.logprobs, metadata=metadata, **_manner(request))


def _manner(request: Generate) -> dict[str, Any]:
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    options = request.stream_options
    return {
        "stream": bool(request.stream),
        "include_usage": bool(options is not None and options.include_usage),
        "return_token_ids": bool(request.return_token_ids),
        "user": request.user,
    }


def _generation(
    prefix: str,
    request: Generate,
    model: ServedModel,
    prompts: list[tuple[int, ...]],
    max_tokens: int | None,
    top_logprobs: int | None,
    settings: ServeSettings,
) -> Generation:
    n = request.n or 1
    if n * len(prompts) > settings.max_choices:
        raise bad_request(f"{len(prompts)} prompts × n = {n} is more than {settings.max_choices} choices", "n")
    longest = max(map(len, prompts))
    room = None if model.context is None else model.context - longest
    if max_tokens is None:
        max_tokens = model.default_max_tokens if room is None else max(1, min(model.default_max_tokens, room))
    if room is not None and max_tokens > room:
        raise bad_request(
            f"a prompt of {longest} tokens and {max_tokens} new ones exceed the model's context of "
            f"{model.context} tokens; shorten the prompt or lower max_tokens",
            "max_tokens",
            "context_length_exceeded",
        )
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > MAX_STOP:
        raise bad_request(f"stop takes at most {MAX_STOP} texts, not {len(stop)}", "stop")
    try:
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(0, request.top_k or 0),
            min_p=request.min_p or 0.0,
            stop=tuple(stop),
            stop_tokens=_stop_tokens(request, model, chat=prefix == "chatcmpl"),
            ignore_eos=bool(request.ignore_eos),
            seed=request.seed,
            n=n,
            top_logprobs=top_logprobs or 0,
        )
    except ConfigError as error:
        raise bad_request(str(error), _field_named(str(error))) from None
    return Generation(f"{prefix}-{uuid.uuid4().hex}", model, prompts, sampling, settings.request_timeout_s)


def _stop_tokens(request: Generate, model: ServedModel, *, chat: bool) -> tuple[int, ...]:
    asked = _checked_ids(request.stop_token_ids or [], model, "stop_token_ids")
    own = model.renderer.stop_tokens if chat and not request.ignore_eos else ()
    return tuple(sorted({*asked, *own}))


def _field_named(text: str) -> str | None:
    words = text.removeprefix("sampling: ").split()
    return words[0] if text.startswith("sampling: ") and words else None


async def _prompts(request: CompletionRequest, model: ServedModel, settings: ServeSettings) -> list[tuple[int, ...]]:
    prompt = request.prompt
    items: list[Any] = [prompt] if isinstance(prompt, str) or all(type(item) is int for item in prompt) else prompt
    if prompt == [] or not items:
        raise bad_request("prompt must not be empty", "prompt")
    if len(items) > settings.max_choices:
        raise bad_request(f"{len(items)} prompts are more than {settings.max_choices} choices", "prompt")
    prompts = []
    for item in items:
        if isinstance(item, str):
            prompts.append(await _render(model, item, (), "prompt"))
        elif isinstance(item, list) and item and all(type(token) is int for token in item):
            prompts.append(_checked_ids(item, model, "prompt"))
        else:
            raise bad_request("prompt must be a text, token ids, a list of texts or a list of token ids", "prompt")
    return prompts


def _checked_ids(tokens: list[int], model: ServedModel, param: str) -> tuple[int, ...]:
    size = model.renderer.tokenizer.vocab_size
    for token in tokens:
        if not 0 <= token < size:
            raise bad_request(f"{param}: {token} is no token id; they go from 0 to {size - 1}", param)
    return tuple(tokens)


async def _render(
    model: ServedModel, prompt: str | tuple[Message, ...], tools: tuple[ToolSpec, ...], param: str
) -> tuple[int, ...]:
    try:
        tokens = await asyncio.to_thread(model.renderer.prompt, prompt, tools=tools)
    except PosttrainError as error:
        raise bad_request(f"{param}: {error}", param) from None
    if not tokens:
        raise bad_request(f"{param}: there is nothing to sample after, the prompt has no tokens", param)
    return tuple(tokens)


def _tools(request: ChatRequest, model: ServedModel) -> tuple[ToolSpec, ...]:
    tools = tuple(
        ToolSpec(
            name=tool.function.name,
            description=tool.function.description or "",
            parameters=tool.function.parameters or {},
        )
        for tool in request.tools or ()
    )
    if tools and not isinstance(model.renderer, ParsesAnswers):
        raise bad_request(f"the model {model.name!r} has no syntax for tool calls", "tools", "unsupported_parameter")
    return tools


def _message(turn: WireMessage, where: str) -> Message:
    if turn.tool_calls and turn.role != "assistant":
        raise bad_request(f"{where}: only an assistant calls tools", f"{where}.tool_calls")
    if turn.content is None and not turn.tool_calls and turn.role != "assistant":
        raise bad_request(f"{where}: content is missing", f"{where}.content")
    return Message(
        role=turn.role,
        content=_text(turn, where),
        reasoning=turn.reasoning_content or turn.reasoning,
        tool_calls=tuple(
            _tool_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(turn.tool_calls or ())
        ),
        tool_call_id=turn.tool_call_id,
        name=turn.name,
    )


def _text(turn: WireMessage, where: str) -> str:
    if turn.content is None or isinstance(turn.content, str):
        return turn.content or ""
    for number, part in enumerate(turn.content):
        if part.type != "text" or part.text is None:
            raise bad_request(
                f"{where}: content of type {part.type!r} is not supported; this server reads text",
                f"{where}.content[{number}].type",
                "unsupported_content",
            )
    return "".join(part.text or "" for part in turn.content)


def _tool_call(call: WireToolCall, where: str) -> ToolCall:
    param = f"{where}.function.arguments"
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise bad_request(f"{param}: not a JSON object: {error}", param) from None
    return ToolCall(name=call.function.name, arguments=arguments, id=call.id)
