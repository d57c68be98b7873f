"""The shop's staff, simulated: they ask the served model, look at the rows that come back, and say what they think.

Each question goes through the public API as any client's would, and so does the feedback: a thumb for every answer
that a person looks at, and for some of the wrong ones a corrected query.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from posttrain.core import ServeError, generator
from posttrain.grade import SqlResult, trajectory_from_text
from posttrain.recipes.shop.language import Question
from posttrain.recipes.shop.world import task_of


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One question asked over the API, and what the person made of the answer."""

    question: Question
    completion_id: str
    answer: str
    right: bool
    corrected: bool


async def ask_and_judge(
    url: str,
    api_key: str,
    model: str,
    questions: Sequence[Question],
    grader: SqlResult,
    *,
    correction_share: float,
    seed: int,
    concurrency: int = 16,
) -> list[Visit]:
    """Ask every question and give feedback on every answer.

    Args:
        url: of the server, without a path.
        api_key: sent as a bearer token.
        model: name of the served model.
        questions: what to ask.
        grader: how a person who sees the rows knows that they are wrong.
        correction_share: how many of the wrong answers are corrected with the right query.
        seed: decides which.
        concurrency: questions under way at the same time.

    Raises:
        ServeError: the endpoint refused a request.
    """
    places = asyncio.Semaphore(concurrency)
    headers = {"Authorization": f"Bearer {api_key}"}

    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as client:

        async def post(path: str, body: dict[str, object]) -> dict[str, object]:
            response = await client.post(path, json=body)
            if response.is_error:
                raise ServeError(f"{path} answered {response.status_code}: {response.text[:300]}")
            answer: dict[str, object] = response.json()
            return answer

        async def visit(question: Question) -> Visit:
            async with places:
                body: dict[str, object] = {
                    "model": model,
                    "messages": [{"role": "user", "content": question.text}],
                    "temperature": 0,
                    "user": "staff",
                }
                completion = await post("/v1/chat/completions", body)
                choices = completion["choices"]
                assert isinstance(choices, list)
                answer = str(choices[0]["message"]["content"])
                grade = await grader.grade(trajectory_from_text(task_of(question), answer))
                right = grade.score == 1.0
                corrected = not right and generator(seed, "correction", question.id).random() < correction_share
                about = {"completion_id": completion["id"], "source": "staff"}
                await post("/v1/feedback", {**about, "thumb": right})
                if corrected:
                    await post("/v1/feedback", {**about, "correction": question.sql})
                return Visit(
                    question=question,
                    completion_id=str(completion["id"]),
                    answer=answer,
                    right=right,
                    corrected=corrected,
                )

        return list(await asyncio.gather(*(visit(question) for question in questions)))
