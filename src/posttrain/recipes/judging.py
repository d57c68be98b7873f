"""From `judge:URL#MODEL[,FILE.toml]` on the command line to a judge; the file holds the criteria and the limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from posttrain.core import Config, ConfigError, GradeCase, Grader, Sampling, Task, UsageError, doc, read_toml
from posttrain.engine import RemoteChat
from posttrain.grade import (
    BinaryJudge,
    Budget,
    ConstitutionJudge,
    JudgeCache,
    JudgeModel,
    PairwiseJudge,
    Price,
    RagJudge,
    RubricBook,
    RubricJudge,
    ScaleJudge,
    Shot,
    TemplateJudge,
)
from posttrain.grade.constitution import PRINCIPLES
from posttrain.grade.judge import CORRECT, GOOD
from posttrain.grade.pairwise import BETTER

JudgeKind = Literal["binary", "scale", "template", "pairwise", "rubric", "constitution", "rag"]


class JudgeShot(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worked example: `[[shots]]`."""

    prompt: Annotated[str, doc("the prompt")]
    answer: Annotated[str, doc("an answer to it")]
    verdict: Annotated[bool | float, doc("what it deserves: true or false, or a rating")]
    rationale: Annotated[str, doc("why")] = ""


class JudgeCase(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A gold answer or near miss: `[[cases]]`."""

    prompt: Annotated[str, doc("the prompt")]
    text: Annotated[str, doc("the answer that is judged")]
    low: Annotated[float, doc("the score must be this or more")]
    high: Annotated[float, doc("the score must be this or less")]
    answer: Annotated[str | None, doc("the task's reference answer")] = None
    facts: Annotated[dict[str, Any], doc("the task's facts: a rubric, a context, an opponent")] = {}


class JudgeConfig(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A judge's criteria and limits, as a TOML file."""

    kind: Annotated[JudgeKind, doc("what the judge is asked for")] = "binary"
    criteria: Annotated[str | None, doc("what a good answer is; None: the kind's own")] = None
    reference: Annotated[bool | None, doc("show the judge the reference answers; None: the kind's own habit")] = None
    low: Annotated[int, doc("worst rating of a scale")] = 1
    high: Annotated[int, doc("best rating of a scale")] = 5
    anchors: Annotated[dict[str, str], doc("what ratings mean, by rating")] = {}
    template: Annotated[str, doc("of kind template: with {question}, {answer}, {reference}")] = ""
    pattern: Annotated[str, doc("of kind template: its first group is the score, from low to high")] = ""
    principles: Annotated[tuple[str, ...], doc("of a constitution; none: the built-in ones")] = ()
    per_call: Annotated[int, doc("principles that each judgement samples", ge=1)] = 3
    rubrics: Annotated[str | None, doc("file of frozen rubrics by task; None: they are in the tasks' facts")] = None
    swap: Annotated[bool, doc("ask pairs in both orders")] = True
    ties: Annotated[bool, doc("pairs may tie")] = True
    shots: Annotated[tuple[JudgeShot, ...], doc("worked examples")] = ()
    cases: Annotated[tuple[JudgeCase, ...], doc("gold answers and near misses by which the judge proves itself")] = ()
    max_tokens: Annotated[int, doc("of a verdict", ge=1)] = 1024
    temperature: Annotated[float, doc("0 is greedy", ge=0)] = 0.0
    attempts: Annotated[int, doc("calls for one verdict, at most", ge=1)] = 3
    deadline_s: Annotated[float, doc("seconds for one verdict", gt=0)] = 120.0
    concurrency: Annotated[int, doc("calls under way at the same time", ge=1)] = 32
    api_key_env: Annotated[str | None, doc("name of the environment variable that holds the key")] = None
    price_input: Annotated[float | None, doc("US dollars per million prompt tokens")] = None
    price_output: Annotated[float | None, doc("US dollars per million completion tokens")] = None
    max_dollars: Annotated[float | None, doc("budget")] = None
    max_calls: Annotated[int | None, doc("budget")] = None
    cache: Annotated[str | None, doc("file of the judge's replies; None: none are kept")] = None


def judge_from(text: str) -> Grader:
    """The judge that `URL#MODEL` or `URL#MODEL,FILE.toml` names.

    Raises:
        UsageError: the text is not of that form, or the file or the key's variable is missing.
        ConfigError: the file holds something that is no setting of a judge.
    """
    address, _, file = text.partition(",")
    url, _, model = address.partition("#")
    if not url.startswith(("http://", "https://")) or not model:
        raise UsageError(f"judge {text!r}: give URL#MODEL or URL#MODEL,FILE.toml, as http://127.0.0.1:8000#qwen3")
    config = JudgeConfig.from_dict(read_toml(Path(file)), file) if file else JudgeConfig()
    return judge_of(config, judge_model(config, url, model))


def judge_model(config: JudgeConfig, url: str, model: str) -> JudgeModel:
    """The served model with the file's limits."""
    key = None
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise UsageError(f"judge: the environment variable {config.api_key_env} (api_key_env) is not set")
    chat = RemoteChat(url, model, api_key=key, timeout_s=config.deadline_s, max_concurrency=config.concurrency)
    priced = config.price_input is not None or config.price_output is not None
    budget = None
    if config.max_dollars is not None or config.max_calls is not None:
        budget = Budget(config.max_dollars, config.max_calls)
    return JudgeModel(
        chat,
        model=f"{url}#{model}",
        sampling=Sampling(max_tokens=config.max_tokens, temperature=config.temperature),
        attempts=config.attempts,
        deadline_s=config.deadline_s,
        price=Price(input=config.price_input or 0.0, output=config.price_output or 0.0) if priced else None,
        budget=budget,
        cache=JudgeCache(config.cache) if config.cache else None,
    )


def judge_of(config: JudgeConfig, judge: JudgeModel) -> Grader:
    """The grader that a configuration describes, judged by `judge`."""
    shots = tuple(
        Shot(prompt=s.prompt, answer=s.answer, verdict=s.verdict, rationale=s.rationale) for s in config.shots
    )
    cases = tuple(_case(place, case) for place, case in enumerate(config.cases))
    if config.kind == "binary":
        criteria = config.criteria or CORRECT
        guided = criteria == CORRECT if config.reference is None else config.reference
        return BinaryJudge(judge, criteria, reference="task" if guided else "none", shots=shots, cases=cases)
    if config.kind == "scale":
        try:
            anchors = {int(rating): meaning for rating, meaning in config.anchors.items()}
        except ValueError:
            raise ConfigError(f"judge: anchors are by rating, not {sorted(config.anchors)}") from None
        return ScaleJudge(
            judge,
            config.criteria or GOOD,
            low=config.low,
            high=config.high,
            anchors=anchors,
            reference="task" if config.reference else "none",
            shots=shots,
            cases=cases,
        )
    if config.kind == "template":
        low, high = float(config.low), float(config.high)
        return TemplateJudge(judge, config.template, pattern=config.pattern, low=low, high=high, cases=cases)
    if config.kind == "pairwise":
        return PairwiseJudge(
            judge,
            config.criteria or BETTER,
            swap=config.swap,
            ties=config.ties,
            reference=bool(config.reference),
            cases=cases,
        )
    if config.kind == "rubric":
        book = RubricBook(config.rubrics) if config.rubrics else None
        return RubricJudge(judge, book, reference=bool(config.reference), cases=cases)
    if config.kind == "constitution":
        return ConstitutionJudge(judge, config.principles or PRINCIPLES, per_call=config.per_call, cases=cases)
    return RagJudge(judge, cases=cases)


def _case(place: int, case: JudgeCase) -> GradeCase:
    task = Task(id=f"case-{place}", prompt=case.prompt, answer=case.answer, facts=case.facts)
    return GradeCase(task=task, text=case.text, low=case.low, high=case.high)
