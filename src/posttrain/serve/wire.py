"""Requests as they come over the wire: strict structs, and errors that name the field.

A field of a request is one of four: understood (a field of the structs below), ignored (`IGNORED`), accepted only at a
value that changes nothing (`NEUTRAL`), or unknown. The last two, at other values, are errors: a client that asks for
something must not believe that it got it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from posttrain.serve.api_error import ApiError, bad_request

# Has no effect on the answer. The answer's header `x-ignored-fields` lists those that a request carried.
IGNORED = frozenset(
    "prompt_cache_key prompt_cache_retention safety_identifier service_tier store stream_options.include_obfuscation "
    "priority request_id".split()
)
# Features of other servers that are not here, with the values at which they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None,),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "length_penalty": (None, 1),
    "logit_bias": (None, {}),
    "min_tokens": (None, 0),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "prompt_logprobs": (None, 0),
    "reasoning_effort": (None,),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "use_beam_search": (None, False),
    "verbosity": (None,),
    "web_search_options": (None,),
}

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Choice = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=512)]


class Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything read from a client."""


class StreamOptions(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: Any = None  # ignored
    continuous_usage_stats: Literal[False] | None = None


class Generate(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of generation share."""

    model: Name
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None  # 0 and -1 keep all
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Count | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Choice] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None  # kept with the interaction
    return_token_ids: bool | None = None


class TextPart(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a message's content. Parts of other types are refused by name."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: Any = None
    cache_control: Any = None  # ignored


class WireFunction(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function that the assistant called."""

    name: Name
    arguments: str = "{}"


class WireToolCall(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool call in an assistant's earlier turn."""

    function: WireFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None  # left over from a stream; ignored


class WireMessage(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn, as a client sends it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[WireToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None  # ignored, as are annotations: clients send back what they were given
    annotations: Any = None
    audio: None = None
    function_call: None = None


class FunctionSpec(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class WireTool(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool of a request."""

    function: FunctionSpec
    type: Literal["function"] = "function"


class ChatRequest(Generate, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[WireMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[WireTool] | None = None
    tool_choice: Literal["auto", "none"] | None = None


class CompletionRequest(Generate, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: str | list[Any]  # text, texts, token ids, or lists of token ids; told apart in `prompts_of`
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class FeedbackRequest(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /v1/feedback: a completion and exactly one signal about it."""

    completion_id: Name
    choice: Choice = 0
    thumb: bool | Literal["up", "down"] | UnsetType = UNSET
    rating: float | UnsetType = UNSET
    preferred: bool | str | UnsetType = UNSET  # true, "tie_good" or "tie_bad"
    rejected: Rejected | UnsetType = UNSET
    correction: Annotated[str, Meta(min_length=1)] | UnsetType = UNSET
    label: Label | UnsetType = UNSET
    comment: str = ""
    source: Name = "user"


class SwapRequest(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """POST /admin/models/{name}/swap."""

    card_id: Name | None = None  # None: the newest champion


class Rejected(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answer that lost a comparison; without an id, another choice of the same completion."""

    completion_id: Name | None = None
    choice: Choice = 0


class Label(Strict, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named value: an outcome, a category, a score."""

    name: Name
    value: bool | float | str


T = TypeVar("T", bound=Strict)


def parse_body(body: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """Read and check a request.

    Args:
        body: JSON.
        kind: struct of the endpoint.

    Returns:
        The request, and the names of the fields that it carries and that are ignored.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        fields = msgspec.json.decode(body)
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise bad_request("the body must be a JSON object")
    ignored = []
    if issubclass(kind, Generate):
        ignored = sorted(IGNORED & fields.keys())
        fields = {name: value for name, value in fields.items() if name not in IGNORED}
        _refuse_unsupported(fields, kind)
    try:
        return msgspec.convert(fields, kind), ignored
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise _validation_error(error) from None


def _refuse_unsupported(fields: dict[str, Any], kind: type[Strict]) -> None:
    known = kind.__struct_fields__
    for name in list(fields):
        if name in known:
            continue
        if name not in NEUTRAL:
            raise bad_request(f"unknown field {name!r}", name, "unknown_parameter")
        value = fields.pop(name)
        if not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]) and not (
            isinstance(value, float) and value in NEUTRAL[name]
        ):
            raise bad_request(f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")


def _validation_error(error: msgspec.ValidationError) -> ApiError:
    text, _, path = str(error).partition(" - at `$.")
    param: str | None = path.rstrip("`") or None
    field = re.search(r"(?:missing required|unknown) field `([^`]*)`", text)
    if field:
        param = ".".join(filter(None, (param, field.group(1))))
    text = text.removeprefix("Object contains ").removeprefix("Object ")
    return bad_request(f"{param}: {text}" if param else text, param, "invalid_value")
