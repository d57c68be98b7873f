"""The records of one circle: Task → Trajectory → Grade → Example → Checkpoint.

Shapes: T tokens of one sequence. Token ids are ints, logprobs are natural logarithms, times are seconds.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from posttrain.core.errors import ConfigError
from posttrain.core.messages import Message, ToolSpec
from posttrain.core.record import Record


class StopReason(StrEnum):
    """Why a completion or an episode ended."""

    EOS = "eos"  # the model wrote an end-of-sequence or stop token
    STOP = "stop"  # a stop string appeared
    LENGTH = "length"  # max_tokens reached: clipped
    CANCELLED = "cancelled"  # the caller withdrew the request
    TIMEOUT = "timeout"  # a deadline passed
    ERROR = "error"  # something failed; `error` says what


class Task(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="task/1"):
    """One thing to do: a prompt, and what a grader needs to know about a good answer."""

    id: str
    prompt: str | tuple[Message, ...]  # text is sampled from as it stands; messages go through the chat template
    answer: str | None = None  # the reference answer, if there is one
    facts: dict[str, Any] = {}  # whatever else the grader needs (accepted answers, tests, a database …)
    tools: tuple[ToolSpec, ...] = ()
    tags: tuple[str, ...] = ()  # subsets for reporting ("join", "level 5" …)
    cluster: str | None = None  # tasks that share a passage or template; standard errors are clustered by it

    def prompt_text(self) -> str:
        """The prompt as plain text, for hashing, contamination checks and reports."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(message.content for message in self.prompt)


class Sampling(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to sample. The defaults sample from the model's own distribution."""

    max_tokens: int = 256  # new tokens at most, per completion
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches top_p
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    min_p: float = 0.0  # keep tokens at least min_p times as likely as the most likely one
    stop: tuple[str, ...] = ()  # strings that end the completion; not part of its text
    stop_tokens: tuple[int, ...] = ()  # token ids that end it, besides the tokenizer's end-of-sequence ids
    ignore_eos: bool = False  # go on to max_tokens (benchmarks)
    seed: int | None = None  # completion i of a request draws from derive_seed(seed, i); None: a fresh seed
    n: int = 1  # completions per prompt; they share the prompt's prefill
    top_logprobs: int = 0  # also return the k most likely tokens at each position

    def __post_init__(self) -> None:
        checks = [
            (self.max_tokens >= 1, "max_tokens", "at least 1"),
            (self.temperature >= 0, "temperature", "0 or more"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.top_k >= 0, "top_k", "0 (off) or more"),
            (0 <= self.min_p <= 1, "min_p", "between 0 and 1"),
            (self.n >= 1, "n", "at least 1"),
            (self.top_logprobs >= 0, "top_logprobs", "0 or more"),
            (all(self.stop), "stop", "made of non-empty strings"),
        ]
        for holds, field, rule in checks:
            if not holds:
                raise ConfigError(f"sampling: {field} must be {rule}, not {getattr(self, field)!r}")


class SampleRequest(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prompt for a sampler, with how to sample from it."""

    prompt: tuple[int, ...]
    sampling: Sampling
    id: str = ""


class Completion(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a sampler wrote after one prompt.

    `tokens` holds every sampled id, the end-of-sequence token too; `text` is a view of it without special tokens and
    without the stop string.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # T, of the distribution that was sampled from (temperature, truncation applied)
    policy_logprobs: tuple[float, ...]  # T, of the model itself: temperature 1, no truncation
    text: str
    stop_reason: StopReason
    index: int = 0  # which of the prompt's n siblings
    request_id: str = ""
    weight_version: int = 0  # the version that sampled the first token
    last_weight_version: int = 0  # the version that sampled the last token
    num_prompt_tokens: int = 0
    top_logprobs: tuple[dict[int, float], ...] = ()  # T, token id → logprob
    error: str | None = None


class StepResult(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an environment answers to one turn of the policy."""

    messages: tuple[Message, ...] = ()  # what the policy reads next; may be empty where the episode is over
    reward: float = 0.0  # for this turn; an episode's reward is the sum over its turns
    done: bool = False  # the episode is over
    info: dict[str, Any] = {}  # numbers in it are summed over the episode and become metrics of the trajectory


class Trajectory(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="trajectory/1"):
    """An episode as the sampler saw it: token in, token out; text is a view."""

    id: str
    task: Task
    tokens: tuple[int, ...]  # T, prompt and everything after it
    mask: tuple[bool, ...]  # T, True where the policy wrote the token
    logprobs: tuple[float, ...]  # T, sampler's logprob where mask, else 0
    policy_logprobs: tuple[float, ...]  # T, the model's own logprob where mask, else 0
    text: str  # what the policy wrote last (the answer), as text
    stop_reason: StopReason
    messages: tuple[Message, ...] = ()  # the conversation as a view, if there is one
    group: str = ""  # siblings sampled from the same prompt share it
    index: int = 0  # which sibling
    weight_version: int = 0  # oldest version that wrote a token
    last_weight_version: int = 0
    seconds: float = 0.0
    error: str | None = None  # set when stop_reason is ERROR or TIMEOUT
    metrics: dict[str, float] = {}

    def num_completion_tokens(self) -> int:
        """How many tokens the policy wrote."""
        return sum(self.mask)

    def failed(self) -> bool:
        """True where the rollout itself failed: it is masked out of the loss and counted."""
        return self.stop_reason in (StopReason.ERROR, StopReason.TIMEOUT, StopReason.CANCELLED)


class Grade(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="grade/1"):
    """What a grader says of one trajectory. `score` is None if and only if grading failed (`error` says why)."""

    score: float | None
    grader: str
    parts: dict[str, float] = {}  # named parts of the score, before weights
    rationale: str = ""
    error: str | None = None
    seconds: float = 0.0
    cost: float = 0.0  # in US dollars, for judged grades

    def __post_init__(self) -> None:
        if (self.score is None) != (self.error is not None):
            raise ValueError("a grade has either a score or an error")


class GradeCase(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A case on which a grader proves itself: `text` as the answer to `task` must score within [low, high]."""

    task: Task
    text: str
    low: float
    high: float
    why: str = ""


class TokenSequence(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sequence to train on. Position t of `mask` and `columns` speaks of token t, predicted from those before."""

    tokens: tuple[int, ...]  # T
    mask: tuple[bool, ...]  # T, True where the token is a target; mask[0] is False, nothing predicts it
    columns: dict[str, tuple[float, ...]] = {}  # T each: advantages, sampler_logprobs, old_logprobs, ref_logprobs …


class Example(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="example/1"):
    """What the trainer eats: one sequence (SFT, policy gradient) or several that belong together (a pair)."""

    id: str
    sequences: tuple[TokenSequence, ...]
    scalars: dict[str, float] = {}  # per example: weight, margin, label …
    group: str = ""  # examples of one group share a prompt

    def num_targets(self) -> int:
        """Target tokens, over all sequences."""
        return sum(sum(sequence.mask) for sequence in self.sequences)

    def num_tokens(self) -> int:
        """All tokens, over all sequences."""
        return sum(len(sequence.tokens) for sequence in self.sequences)


class Checkpoint(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="checkpoint/1"):
    """A verified training checkpoint on disk."""

    path: str
    step: int
    digest: str  # SHA-256 of the manifest, which holds the SHA-256 of every file
