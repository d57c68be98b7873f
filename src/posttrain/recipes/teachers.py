"""Teachers: a model folder or an OpenAI-compatible endpoint that answers prompts, tells likely tokens, or scores.

What a teacher answered is kept on disk under a hash of teacher, sampling and prompt, and is never asked for again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from posttrain.core import (
    ModelError,
    Record,
    RolloutError,
    SampleRequest,
    Sampling,
    StopReason,
    Task,
    Trajectory,
    UsageError,
    content_hash,
    derive_seed,
    read_jsonl,
)
from posttrain.engine import LocalEngine
from posttrain.engine.http import JsonClient, RemoteFailure
from posttrain.recipes.policy import Policy, load_policy
from posttrain.registry.durable import trim_torn_line
from posttrain.render import Tokenizer

_BATCH = 256  # prompts between two writes to the cache


class TeacherAnswer(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="teacher_answer/1"
):
    """One answer of a teacher, as the cache keeps it."""

    prompt: str  # hash of the prompt
    index: int  # which of n samples
    text: str
    tokens: tuple[int, ...] = ()  # of the teacher's vocabulary, where it tells them
    top: tuple[dict[int, float], ...] = ()  # for each of `tokens`, the likeliest ones: id → logprob
    stop_reason: StopReason = StopReason.EOS


class Teacher(Protocol):
    """Who answers."""

    identity: str  # what the cache is kept by

    async def answer(self, tasks: Sequence[Task], sampling: Sampling) -> list[list[TeacherAnswer]]:
        """For each task its n answers; what failed is left out."""
        ...


class LocalTeacher:
    """A teacher from a folder, sampled by the local engine."""

    def __init__(self, policy: Policy, engine: LocalEngine, identity: str) -> None:
        self.policy, self.engine, self.identity = policy, engine, identity

    async def answer(self, tasks: Sequence[Task], sampling: Sampling) -> list[list[TeacherAnswer]]:
        """See `Teacher`."""
        stops = tuple(sorted({*sampling.stop_tokens, *self.policy.renderer.stop_tokens}))
        requests = [
            SampleRequest(
                prompt=tuple(self.policy.renderer.prompt(task)),
                sampling=sampling.replace(stop_tokens=stops, seed=_seed_of(task, sampling)),
                id=task.id,
            )
            for task in tasks
        ]
        return [
            [
                TeacherAnswer(
                    prompt=prompt_hash(task),
                    index=completion.index,
                    text=completion.text,
                    tokens=completion.tokens,
                    top=completion.top_logprobs,
                    stop_reason=completion.stop_reason,
                )
                for completion in completions
                if completion.error is None
            ]
            for task, completions in zip(tasks, await self.engine.sample(requests), strict=True)
        ]


class RemoteTeacher:
    """A teacher behind an OpenAI-compatible endpoint.

    Conversations go to /chat/completions, texts to /completions. Where top logprobs are asked for, the prompt goes as
    the student's token ids to /completions, and the server must be of the student's vocabulary: tokens come as ids
    (vLLM's `return_token_ids` and `return_tokens_as_token_ids`) or, where a text is that of one token only, as text.
    """

    def __init__(
        self, url: str, model: str, student: Policy, *, max_concurrency: int = 32, transport: Any = None
    ) -> None:
        self.model, self.student = model, student
        self.identity = f"{url} {model}"
        self.client = JsonClient(
            url,
            api_key=os.environ.get("OPENAI_API_KEY"),
            timeout_s=300.0,
            retries=4,
            max_concurrency=max_concurrency,
            transport=transport,
        )
        self._ids: dict[str, int] = {}

    async def answer(self, tasks: Sequence[Task], sampling: Sampling) -> list[list[TeacherAnswer]]:
        """See `Teacher`."""
        return list(await asyncio.gather(*(self._one(task, sampling) for task in tasks)))

    async def score(self, trajectories: Sequence[Trajectory]) -> list[list[float] | None]:
        """Logprob of every token after the first under the teacher's model, 0 for the first; None where it failed.

        Needs a server that knows vLLM's `prompt_logprobs`.
        """
        return list(await asyncio.gather(*(self._score(trajectory.tokens) for trajectory in trajectories)))

    async def _score(self, tokens: Sequence[int]) -> list[float] | None:
        body = {"model": self.model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        try:
            told = (await self.client.post("/completions", body))["choices"][0]["prompt_logprobs"]
            rest = zip(told[1:], tokens[1:], strict=True)
            return [0.0, *(float(entry[str(token)]["logprob"]) for entry, token in rest)]
        except (RemoteFailure, KeyError, TypeError, ValueError, IndexError):
            return None

    async def _one(self, task: Task, sampling: Sampling) -> list[TeacherAnswer]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "n": sampling.n,
            "seed": _seed_of(task, sampling) >> 32,
        }
        if sampling.top_logprobs:
            prompt = list(self.student.renderer.prompt(task))
            flags = {"return_token_ids": True, "return_tokens_as_token_ids": True}
            path, body = "/completions", {**body, **flags, "prompt": prompt, "logprobs": sampling.top_logprobs}
        elif isinstance(task.prompt, str):
            path, body = "/completions", {**body, "prompt": task.prompt}
        else:
            messages = [{"role": message.role, "content": message.content} for message in task.prompt]
            path, body = "/chat/completions", {**body, "messages": messages}
        try:
            choices = (await self.client.post(path, body))["choices"]
            return [self._read(task, choice, index) for index, choice in enumerate(choices)]
        except (RemoteFailure, KeyError, TypeError, ValueError, IndexError):
            return []

    def _read(self, task: Task, choice: dict[str, Any], index: int) -> TeacherAnswer:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        tokens = tuple(int(token) for token in choice.get("token_ids") or ())
        top: tuple[dict[int, float], ...] = ()
        details = choice.get("logprobs") or {}
        if tokens and details.get("top_logprobs"):
            top = tuple(self._by_id(entry) for entry in details["top_logprobs"])
            if len(top) != len(tokens):
                raise ValueError(f"{len(tokens)} tokens, top logprobs of {len(top)}")
        clipped = choice.get("finish_reason") == "length"
        return TeacherAnswer(
            prompt=prompt_hash(task),
            index=index,
            text=text,
            tokens=tokens,
            top=top,
            stop_reason=StopReason.LENGTH if clipped else StopReason.EOS,
        )

    def _by_id(self, entry: dict[str, float]) -> dict[int, float]:
        """Token ids of what a server named; texts that several tokens share are left out."""
        if not self._ids and not all(name.startswith("token_id:") for name in entry):
            decode, size = self.student.tokenizer.decode, self.student.tokenizer.vocab_size
            texts = [decode([token], skip_special_tokens=False) for token in range(size)]
            seen = {text: token for token, text in enumerate(texts)}
            twice = {text for token, text in enumerate(texts) if seen[text] != token}
            self._ids = {text: token for text, token in seen.items() if text not in twice}
        named = {
            int(name[9:]) if name.startswith("token_id:") else self._ids.get(name): value
            for name, value in entry.items()
        }
        return {token: float(value) for token, value in named.items() if token is not None}


async def cached_answers(
    teacher: Teacher,
    tasks: Sequence[Task],
    sampling: Sampling,
    cache: Path,
    *,
    max_failed: float = 0.05,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[list[TeacherAnswer]]:
    """The teacher's answers to each task, asked for once and then read from the cache.

    A run that is killed has kept what it got, to within the last 256 prompts.

    Args:
        cache: folder of caches; the file's name is a hash of teacher and sampling.
        max_failed: share of prompts without an answer that is let pass.

    Raises:
        RolloutError: more of the prompts got no answer.
    """
    key = content_hash([teacher.identity, sampling.to_dict()])[:16]
    path = cache / f"{key}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, list[TeacherAnswer]] = {}
    if path.exists():
        trim_torn_line(path)
        for answer in read_jsonl(path, TeacherAnswer):
            known.setdefault(answer.prompt, []).append(answer)
    missing = list({prompt_hash(task): task for task in tasks if prompt_hash(task) not in known}.values())
    for start in range(0, len(missing), _BATCH):
        part = missing[start : start + _BATCH]
        found = await teacher.answer(part, sampling)
        with path.open("ab") as file:
            for task, answers in zip(part, found, strict=True):
                file.writelines(answer.to_json() + b"\n" for answer in answers)
                if answers:
                    known[prompt_hash(task)] = answers
        on_progress(start + len(part))
    failed = sum(prompt_hash(task) not in known for task in tasks)
    if failed and (failed > max_failed * len(tasks) or failed == len(tasks)):
        raise RolloutError(
            f"the teacher {teacher.identity} answered {len(tasks) - failed} of {len(tasks)} prompts; "
            f"at most {max_failed:.0%} may fail. Is it reachable, and does it take these prompts?"
        )
    return [known.get(prompt_hash(task), []) for task in tasks]


def prompt_hash(task: Task) -> str:
    """The same for the same prompt and tools."""
    prompt = task.prompt if isinstance(task.prompt, str) else [message.to_dict() for message in task.prompt]
    return content_hash([prompt, [tool.to_dict() for tool in task.tools]])[:32]


def _seed_of(task: Task, sampling: Sampling) -> int:
    return derive_seed(sampling.seed or 0, "teacher", prompt_hash(task))


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """The same for tokenizers in which every id is the same token."""
    return content_hash([tokenizer.token(token) for token in range(tokenizer.vocab_size)])


def load_teacher(name_or_path: str, student: Policy, *, device: str = "cpu", dtype: str = "float32") -> Policy:
    """A teacher whose distributions can be compared with the student's, token by token.

    Raises:
        ModelError: its tokenizer gives other ids, so that its probabilities are of other tokens.
    """
    if is_endpoint(name_or_path):
        raise UsageError(f"{name_or_path}: this loss needs a teacher's whole distribution: give a model folder")
    teacher = load_policy(name_or_path, device=device, dtype=dtype)
    if vocabulary_hash(teacher.tokenizer) != vocabulary_hash(student.tokenizer):
        ours, theirs = student.tokenizer, teacher.tokenizer
        pairs = ((token, ours.token(token), theirs.token(token)) for token in range(ours.vocab_size))
        odd = next((f"id {token} is {a!r} here and {b!r} there" for token, a, b in pairs if a != b), "")
        raise ModelError(
            f"{name_or_path}: the teacher's tokenizer ({theirs.vocab_size} ids) is not the student's "
            f"({ours.vocab_size} ids){'; ' + odd if odd else ''}. A divergence compares token by token and needs one "
            "vocabulary; teach by answers instead (--answers teacher --loss nll), which only needs text"
        )
    return teacher


def shared_entries(student: Policy, teacher: Policy) -> int | None:
    """How many entries of two heads to compare: None for all, else without the rows that pad one of them."""
    sizes = student.model.config.vocab_size, teacher.model.config.vocab_size
    return None if sizes[0] == sizes[1] else student.tokenizer.vocab_size


def is_endpoint(text: str) -> bool:
    """True for an address rather than a folder or a name."""
    return text.startswith(("http://", "https://"))
