"""The records of the second half of the circle: EvalReport → ModelCard → Interaction → Feedback."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.core.messages import Message
from posttrain.core.record import Record
from posttrain.core.records import Grade, Sampling, StopReason, Task


class Interval(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A number with its interval. No score leaves the house without one."""

    value: float
    low: float
    high: float
    n: int  # independent units behind it (questions, clusters)
    method: str  # "wilson", "bootstrap", "clustered" …
    confidence: float = 0.95


class EvalSample(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One answer to one evaluation task, with its grade."""

    task: Task
    index: int  # which of n samples
    text: str
    grade: Grade
    stop_reason: StopReason
    num_tokens: int


class EvalReport(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="eval_report/1"
):
    """What a checkpoint scored on a suite, sample by sample."""

    suite: str
    suite_hash: str  # of the tasks: two reports compare only if equal
    model: str  # digest or path of the weights
    sampling: Sampling
    metrics: dict[str, Interval]  # "accuracy", "mean@k", "pass@k", "accuracy/<tag>" …
    samples: tuple[EvalSample, ...]
    num_failed: int = 0  # samples that could not be graded; they count as wrong, and are told apart here
    seconds: float = 0.0
    num_tokens: int = 0  # tokens sampled


class Comparison(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="comparison/1"):
    """Candidate against champion on the same tasks: a paired test."""

    suite: str
    candidate: str
    champion: str
    difference: Interval  # candidate − champion, paired bootstrap
    wins: int  # tasks that only the candidate gets right
    losses: int
    ties: int
    p_value: float  # McNemar's exact test, two-sided
    better: bool  # the difference's lower bound is above the margin
    margin: float = 0.0


class ModelCard(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="model_card/1"):
    """A model in the registry: where its weights are and where they came from."""

    id: str  # digest of the weights' folder
    name: str  # human name: "shop-sql/grpo"
    path: str  # folder
    parents: tuple[str, ...] = ()  # artifact ids: base model, datasets, run
    run: str | None = None
    recipe: str | None = None
    metrics: dict[str, Interval] = {}
    meta: dict[str, Any] = {}
    created_s: float = 0.0  # Unix time


class Interaction(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="interaction/1"
):
    """One served answer, with its exact tokens and the model version that wrote it."""

    id: str  # the completion id that the client saw: "chatcmpl-…"
    choice: int  # index among n choices
    model: str  # model card id
    model_name: str
    messages: tuple[Message, ...] | None  # chat requests
    prompt: str  # the exact text that was sampled from
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    stop_reason: StopReason
    sampling: Sampling
    weight_version: int = 0
    user: str | None = None
    created_s: float = 0.0
    seconds: float = 0.0
    metadata: dict[str, Any] = {}


FeedbackKind = Literal["thumb", "rating", "preferred", "correction", "label"]


class Feedback(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="feedback/1"):
    """One signal about a served answer."""

    id: str
    completion_id: str
    choice: int = 0
    kind: FeedbackKind
    value: bool | float | str | None = None  # thumb: bool; rating: number; correction: text; label: its value
    name: str = ""  # of a label
    rejected_id: str | None = None  # preferred: the completion that lost (may equal completion_id: another choice)
    rejected_choice: int = 0
    comment: str = ""
    source: str = "user"  # who said it: user, annotator, grader …
    created_s: float = 0.0
