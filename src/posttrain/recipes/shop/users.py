"""The shop's staff, simulated: they ask the served model, look at the rows that come back, and say what they think.

Each question goes through the public API as any client's would, and so does the feedback: a thumb for every answer
that a person looks at, and for some of the wrong ones a corrected query.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from posttrain import data as rows
from posttrain.core import Interaction, ServeError, generator
from posttrain.data import CompletionRow
from posttrain.feedback import FeedbackStore
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
    store: FeedbackStore,
    *,
    correction_share: float,
    seed: int,
    concurrency: int = 16,
) -> list[Visit]:
    """Ask every question and give feedback on every answer, except what the store shows was done before.

    Args:
        url: of the server, without a path.
        api_key: sent as a bearer token.
        model: name of the served model.
        questions: what to ask.
        grader: how a person who sees the rows knows that they are wrong.
        store: the server's; what an interrupted run asked and said is in it, and is not asked or said again.
        correction_share: how many of the wrong answers are corrected with the right query.
        seed: decides which.
        concurrency: questions under way at the same time.

    Raises:
        ServeError: the endpoint refused a request.
    """
    places = asyncio.Semaphore(concurrency)
    headers = {"Authorization": f"Bearer {api_key}"}
    asked = _asked(store)

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
                if question.text in asked:
                    completion_id, answer = asked[question.text].id, asked[question.text].text
                else:
                    completion = await post("/v1/chat/completions", body)
                    choices = completion["choices"]
                    assert isinstance(choices, list)
                    completion_id, answer = str(completion["id"]), str(choices[0]["message"]["content"])
                grade = await grader.grade(trajectory_from_text(task_of(question), answer))
                right = grade.score == 1.0
                corrected = not right and generator(seed, "correction", question.id).random() < correction_share
                about = {"completion_id": completion_id, "source": "staff"}
                said = {signal.kind for signal in store.feedback_for(completion_id)}
                if "thumb" not in said:
                    await post("/v1/feedback", {**about, "thumb": right})
                if corrected and "correction" not in said:
                    await post("/v1/feedback", {**about, "correction": question.sql})
                return Visit(
                    question=question,
                    completion_id=completion_id,
                    answer=answer,
                    right=right,
                    corrected=corrected,
                )

        return list(await asyncio.gather(*(visit(question) for question in questions)))


def _asked(store: FeedbackStore) -> dict[str, Interaction]:
    """Answers that were already served, by question."""
    found: dict[str, Interaction] = {}
    cursor: int | None = None
    while True:
        page = store.interactions(cursor=cursor)
        found.update((item.messages[-1].content, item) for item in page.items if item.messages)
        if page.next_cursor is None:
            return found
        cursor = page.next_cursor


def rows_of(exported: Path) -> list[CompletionRow]:
    """Exported rows in an order that depends on their content alone; that of the file is the order of arrival."""
    found = rows.load(exported, kind="completion").rows if exported.stat().st_size else ()
    ordered = sorted(found, key=lambda row: row.replace(id="").to_json())
    return [row.replace(id=f"feedback-{number}") for number, row in enumerate(ordered)]
