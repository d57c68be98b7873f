"""Small instances of every judged grader that prove themselves here and now, without a model or a network.

What is proven is all that lies around a judge: prompts and fences, structure, reading of replies, arithmetic, batching.
Whether a live model judges well is shown by `prove(BinaryJudge(JudgeModel(RemoteChat(…))))` and by calibration.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from typing import Any

from posttrain.core import Grader, Message, Task, Trajectory
from posttrain.grade.answer import answer_text, right, wrong
from posttrain.grade.combine import Function
from posttrain.grade.constitution import ConstitutionJudge
from posttrain.grade.http_reward import HttpReward
from posttrain.grade.judge import BinaryJudge, ScaleJudge, TemplateJudge
from posttrain.grade.judge_model import JudgeModel, ScriptedChat
from posttrain.grade.judge_prompt import unfenced
from posttrain.grade.pairwise import PairwiseJudge
from posttrain.grade.panel import Panel
from posttrain.grade.people import HumanGrade, People
from posttrain.grade.rag import RagJudge
from posttrain.grade.rubric import RubricJudge

_CAPITAL = Task(id="capital", prompt="What is the capital of France?", answer="Paris")
_SAME = [right(_CAPITAL, "Paris"), wrong(_CAPITAL, "Lyon")]


def judged_graders() -> list[Grader]:
    """One of each, over a script that knows what little their cases ask for."""
    judge = JudgeModel(ScriptedChat(plain_reply))
    graders: list[Grader] = [
        BinaryJudge(judge),
        ScaleJudge(judge, name="judge_5"),
        ScaleJudge(judge, high=10, name="judge_10"),
        TemplateJudge(
            judge,
            "Question: {question}\nAnswer: {answer}\nReference: {reference}\nEnd with [[0]] to [[9]].",
            pattern=r"\[\[(\d)\]\]",
            high=9.0,
            cases=_SAME,
            name="judge_template",
        ),
        PairwiseJudge(judge, name="judge_pair"),
        RubricJudge(judge),
        ConstitutionJudge(judge),
        RagJudge(judge),
        Panel([BinaryJudge(judge, name="strict"), Function(_says_paris, cases=_SAME)], "weakest", cases=_SAME),
        People(_Known(), cases=_SAME),
    ]
    if importlib.util.find_spec("httpx") is not None:
        graders.append(_reward_server())
    return graders


def plain_reply(messages: Sequence[Message]) -> str:
    """A judge by rule of thumb: looks for the reference, for words of a checklist, for numbers of a passage."""
    prompt = messages[-1].content
    ask = prompt.rsplit("\n\n", 1)[-1]
    answer, question = unfenced(prompt, "answer"), unfenced(prompt, "question")
    good = "Paris" in answer if "France" in question else bool(re.search(r"\d", answer))
    reply: dict[str, Any] = {"rationale": "by rule of thumb"}
    if "[[0]]" in ask:
        return f"It is {'right' if good else 'wrong'}: [[{9 if good else 0}]]"
    if '"meets"' in ask:
        reply["meets"] = good
    elif '"better"' in ask:
        first, second = ("Paris" in unfenced(prompt, name) for name in ("answer A", "answer B"))
        reply["better"] = "tie" if first == second else "A" if first else "B"
    elif '"items"' in ask:
        criteria = [line.partition(". ")[2] for line in unfenced(prompt, "checklist").splitlines()]
        wanted = [text.removeprefix("says to ").replace("recommends", "recommend") for text in criteria]
        met = [text.casefold() in answer.casefold() for text in wanted]
        reply["items"] = [{"item": number, "met": value} for number, value in enumerate(met, 1)]
    elif '"principles"' in ask:
        numbers = re.findall(r"^(\d+)\. ", messages[0].content, re.MULTILINE)
        reply["principles"] = [{"principle": int(number), "kept": "fool" not in answer} for number in numbers]
    elif '"claims"' in ask or '"passages"' in ask:
        reply |= _by_passages(prompt, answer)
    else:
        best = int(re.findall(r"\d+", ask)[-1])
        reply["rating"] = best if good else 1
    return json.dumps(reply)


def _by_passages(prompt: str, answer: str) -> dict[str, Any]:
    passages: list[str] = []
    while text := unfenced(prompt, f"passage {len(passages) + 1}"):
        passages.append(text)
    if '"passages"' in prompt.rsplit("\n\n", 1)[-1]:
        relevant = [bool(re.search(r"\d", text)) for text in passages]
        return {"passages": [{"passage": number, "relevant": value} for number, value in enumerate(relevant, 1)]}
    known = set(re.findall(r"\d+", " ".join(passages)))
    claims = [claim for claim in re.split(r"(?<=\.)\s+", answer) if claim]
    numbers = [set(re.findall(r"\d+", claim)) for claim in claims]
    return {
        "claims": [
            {"claim": claim, "supported": bool(own) and own <= known}
            for claim, own in zip(claims, numbers, strict=True)
        ]
    }


def _says_paris(trajectory: Trajectory) -> float:
    return float("Paris" in answer_text(trajectory))


class _Known:
    """Two people who know the capital of France."""

    async def grades_of(self, trajectory: Trajectory) -> Sequence[HumanGrade]:
        """Both say the same."""
        score = _says_paris(trajectory)
        return [HumanGrade(score=score, person="ann"), HumanGrade(score=score, person="bob")]

    async def ask_for(self, trajectory: Trajectory) -> None:
        """They have seen it."""


def _reward_server() -> HttpReward:
    """A reward server within the process, under a public name."""
    import httpx

    def serve(request: httpx.Request) -> httpx.Response:
        items = json.loads(request.content)["items"]
        grades = [{"id": item["id"], "score": float(item["reference"] in item["answer"])} for item in items]
        return httpx.Response(200, json={"grades": grades})

    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["93.184.215.14"]

    url = "https://reward.example/score"
    return HttpReward(url, resolve=resolve, transport=httpx.MockTransport(serve), cases=_SAME)
