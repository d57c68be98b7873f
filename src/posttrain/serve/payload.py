"""Answers as OpenAI's clients read them: whole bodies, and chunks of a stream.

Logprobs on the wire are the model's own (temperature 1, nothing truncated), like those of the alternatives beside them;
the interaction log keeps those of the distribution that was sampled from.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from posttrain.core import Message, TextTokenizer
from posttrain.serve.generation import Choice, Delta, shown_logprob
from posttrain.serve.job import Job

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def usage(job: Job) -> dict[str, int]:
    """Token counts of a request. A prompt shared by siblings counts once."""
    prompt, completion = job.generation.num_prompt_tokens(), job.generation.num_completion_tokens()
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def body(job: Job) -> dict[str, Any]:
    """The whole answer."""
    write = _chat_choice if job.kind == "chat" else _text_choice
    answer = _head(job, "chat.completion" if job.kind == "chat" else "text_completion")
    answer["choices"] = [write(job, choice) for choice in job.generation.choices]
    answer["usage"] = usage(job)
    if job.kind == "chat" and job.return_token_ids:
        answer["prompt_token_ids"] = job.generation.prompts[0]
    return answer


def opening(job: Job) -> Iterator[dict[str, Any]]:
    """The chunks that open a stream: each choice's role."""
    if job.kind != "chat":
        return
    for choice in job.generation.choices:
        chunk = _chat_chunk(job, choice.index, {"role": "assistant", "content": ""})
        if job.return_token_ids:
            chunk["prompt_token_ids"] = job.generation.prompts[0]
        yield chunk


def chunks(job: Job, delta: Delta) -> Iterator[dict[str, Any]]:
    """The chunks that tell of one step; none where it has nothing to show."""
    choice = delta.choice
    if job.parses:  # tool calls are known once the answer is whole
        if not delta.ended:
            return
        start, text = 0, choice.text
    else:
        start, text = delta.start, delta.text
    tokens = choice.tokens[start:]
    if text or (tokens and (job.return_token_ids or job.top_logprobs is not None)):
        yield _delta_chunk(job, choice, text, start)
    if delta.ended:
        yield _end_chunk(job, choice)


def usage_chunk(job: Job) -> dict[str, Any]:
    """The last chunk, where usage was asked for."""
    return {
        **_head(job, "chat.completion.chunk" if job.kind == "chat" else "text_completion"),
        "choices": [],
        "usage": usage(job),
    }


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _head(job: Job, kind: str) -> dict[str, Any]:
    generation = job.generation
    return {
        "id": generation.id,
        "object": kind,
        "created": int(generation.created_s),
        "model": generation.model.name,
        "system_fingerprint": generation.model.model_id,
    }


def _chat_choice(job: Job, choice: Choice) -> dict[str, Any]:
    message = {"role": "assistant", "refusal": None, **_said(choice)}
    answer: dict[str, Any] = {
        "index": choice.index,
        "message": message,
        "finish_reason": job.finish_reason(choice.index),
        "logprobs": _chat_logprobs(job, choice, 0),
    }
    if job.return_token_ids:
        answer["token_ids"] = choice.tokens
    return answer


def _said(choice: Choice) -> dict[str, Any]:
    """The fields of an assistant's message."""
    response = choice.response
    if response is None:
        return {"content": choice.text}
    said: dict[str, Any] = {"content": response.content or (None if response.tool_calls else "")}
    if response.reasoning is not None:
        said["reasoning_content"] = response.reasoning
    if response.tool_calls:
        said["tool_calls"] = tool_calls(response)
    return said


def tool_calls(message: Message) -> list[dict[str, Any]]:
    """A message's tool calls in OpenAI's form: arguments are JSON text."""
    return [
        {
            "id": call.id or f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": msgspec.json.encode(call.arguments).decode()},
        }
        for call in message.tool_calls
    ]


def _text_choice(job: Job, choice: Choice) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "index": choice.index,
        "text": choice.text,
        "finish_reason": job.finish_reason(choice.index),
        "logprobs": _text_logprobs(job, choice, 0),
    }
    if job.return_token_ids:
        answer["token_ids"] = choice.tokens
        answer["prompt_token_ids"] = job.generation.prompts[choice.prompt]
    return answer


def _chat_chunk(job: Job, index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    chunk = _head(job, "chat.completion.chunk")
    chunk["choices"] = [{"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}]
    if job.include_usage:
        chunk["usage"] = None
    return chunk


def _text_chunk(job: Job, index: int, text: str, finish: str | None = None) -> dict[str, Any]:
    chunk = _head(job, "text_completion")
    chunk["choices"] = [{"index": index, "text": text, "finish_reason": finish, "logprobs": None}]
    if job.include_usage:
        chunk["usage"] = None
    return chunk


def _delta_chunk(job: Job, choice: Choice, text: str, start: int) -> dict[str, Any]:
    if job.kind == "chat":
        delta: dict[str, Any] = {"content": text}
        if choice.response is not None:
            delta = _said(choice)
            for number, call in enumerate(delta.get("tool_calls", ())):
                call["index"] = number
        chunk = _chat_chunk(job, choice.index, delta)
        chunk["choices"][0]["logprobs"] = _chat_logprobs(job, choice, start)
    else:
        chunk = _text_chunk(job, choice.index, text)
        chunk["choices"][0]["logprobs"] = _text_logprobs(job, choice, start)
        if job.return_token_ids and start == 0:
            chunk["choices"][0]["prompt_token_ids"] = job.generation.prompts[choice.prompt]
    if job.return_token_ids:
        chunk["choices"][0]["token_ids"] = choice.tokens[start:]
    return chunk


def _end_chunk(job: Job, choice: Choice) -> dict[str, Any]:
    finish = job.finish_reason(choice.index)
    if job.kind == "chat":
        return _chat_chunk(job, choice.index, {}, finish)
    return _text_chunk(job, choice.index, "", finish)


def _chat_logprobs(job: Job, choice: Choice, start: int) -> dict[str, Any] | None:
    if job.top_logprobs is None:
        return None
    tokenizer = job.generation.model.renderer.tokenizer
    content = []
    for place in range(start, len(choice.tokens)):
        entry = _token_entry(tokenizer, choice.tokens[place], choice.policy_logprobs[place])
        entry["top_logprobs"] = [_token_entry(tokenizer, *pair) for pair in _top(job, choice, place)]
        content.append(entry)
    return {"content": content, "refusal": None}


def _token_entry(tokenizer: TextTokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token], skip_special_tokens=False)
    # A token may be part of a character; its text then is no text, and its bytes are not known here.
    known = list(text.encode()) if _UNFINISHED not in text else None
    return {"token": text, "logprob": shown_logprob(logprob), "bytes": known}


def _text_logprobs(job: Job, choice: Choice, start: int) -> dict[str, Any] | None:
    if job.top_logprobs is None:
        return None
    decode = job.generation.model.renderer.tokenizer.decode
    texts = [decode([token], skip_special_tokens=False) for token in choice.tokens]
    places = range(start, len(choice.tokens))
    return {
        "tokens": texts[start:],
        "token_logprobs": [shown_logprob(choice.policy_logprobs[place]) for place in places],
        "top_logprobs": [
            {decode([token], skip_special_tokens=False): shown_logprob(value) for token, value in top}
            for top in (_top(job, choice, place) for place in places)
        ],
        "text_offset": _offsets(texts)[start:],
    }


def _top(job: Job, choice: Choice, place: int) -> list[tuple[int, float]]:
    if place >= len(choice.top_logprobs) or not job.top_logprobs:
        return []
    ranked = sorted(choice.top_logprobs[place].items(), key=lambda pair: -pair[1])
    return ranked[: job.top_logprobs]


def _offsets(texts: Sequence[str]) -> list[int]:
    offsets, place = [], 0
    for text in texts:
        offsets.append(place)
        place += len(text)
    return offsets
