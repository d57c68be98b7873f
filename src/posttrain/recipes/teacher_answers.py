"""From prompts to what a teacher answers, and from that to examples for a student."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from posttrain.core import DataError, Example, Grader, Sampling, StopReason, Task, TokenSequence, UsageError
from posttrain.data import CompletionRow
from posttrain.grade import grade_all, trajectory_from_text
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.sft import completion_examples
from posttrain.recipes.teachers import (
    LocalTeacher,
    RemoteTeacher,
    TeacherAnswer,
    cached_answers,
    is_endpoint,
    load_teacher,
)
from posttrain.recipes.workbench import Workbench
from posttrain.train import top_k_columns


def ask(
    bench: Workbench,
    tasks: Sequence[Task],
    sampling: Sampling,
    teacher: str,
    student: Policy,
    *,
    master: Policy | None = None,
    endpoint_model: str = "",
    slots: int = 64,
) -> list[list[TeacherAnswer]]:
    """The answers of a teacher to each task, from the cache beside the runs as far as it has them.

    Args:
        teacher: folder, name or http address.
        student: whose vocabulary an endpoint's top logprobs are read in.
        master: the teacher, where it is loaded already.
        endpoint_model: the endpoint's name of it.
        slots: answers that a local teacher samples at the same time.

    Raises:
        UsageError: an endpoint without a model's name.
        ModelError: top logprobs are asked for and the vocabularies differ.
        RolloutError: too many prompts got no answer.
    """
    cache = bench.run.path.parent / "teacher_answers"
    with bench.progress("teacher", len(tasks)) as progress:

        def show(done: int) -> None:
            progress.advance({}, by=done - progress.done)

        if is_endpoint(teacher):
            if not endpoint_model:
                raise UsageError(f"{teacher}: name the endpoint's model with --teacher-model")

            async def remotely() -> list[list[TeacherAnswer]]:
                remote = RemoteTeacher(teacher, endpoint_model, student)
                try:
                    return await cached_answers(remote, tasks, sampling, cache, on_progress=show)
                finally:
                    await remote.client.close()

            return asyncio.run(remotely())
        if master is None:
            device = str(next(student.model.parameters()).device)
            one_vocabulary = sampling.top_logprobs > 0
            master = (
                load_teacher(teacher, student, device=device) if one_vocabulary else load_policy(teacher, device=device)
            )
        identity = bench.registry.add_artifact(master.path, kind="model", name=teacher, storage="reference").id
        length = master.length_for(tasks, sampling.max_tokens)
        with master.engine(slots=slots, length=length, inline=True) as engine:
            local = LocalTeacher(master, engine, identity)
            return asyncio.run(cached_answers(local, tasks, sampling, cache, on_progress=show))


def answer_examples(
    bench: Workbench,
    student: Policy,
    tasks: Sequence[Task],
    answers: Sequence[Sequence[TeacherAnswer]],
    *,
    top_k: int = 0,
    exact: bool = False,
    max_length: int = 2048,
    chat: bool = False,
) -> list[Example]:
    """What a teacher answered as examples for the student.

    Repetitions are left out; so are, where the text is taken, answers cut at their token limit: an end of turn would
    follow them, and teach to stop anywhere.

    Args:
        top_k: also the columns that `train.top_k_forward` reads.
        exact: take the teacher's tokens as they are (one vocabulary); otherwise its text, in the student's tokens.

    Raises:
        DataError: nothing is left.
    """
    whole = not exact and not top_k
    kept: list[tuple[Task, TeacherAnswer]] = []
    clipped = repeated = 0
    for task, own in zip(tasks, answers, strict=True):
        seen: set[str] = set()
        for answer in own:
            if whole and answer.stop_reason is StopReason.LENGTH:
                clipped += 1
            elif answer.text in seen:
                repeated += 1
            else:
                seen.add(answer.text)
                kept.append((task, answer))
    bench.say(f"{len(kept)} answers of the teacher; left out: {clipped} cut at their limit, {repeated} repeated")
    if not kept:
        raise DataError("the teacher gave no answer to learn from; raise --max-tokens if all were cut")
    if whole:
        pairs = [
            CompletionRow(id=f"{task.id}/{answer.index}", prompt=task.prompt, completion=answer.text, tools=task.tools)
            for task, answer in kept
        ]
        return completion_examples(bench, student.renderer, pairs, max_length, chat=chat)
    examples = []
    for task, answer in kept:
        prompt = tuple(student.renderer.prompt(task))
        tokens = prompt + answer.tokens
        if not answer.tokens or (top_k and len(answer.top) != len(answer.tokens)):
            raise DataError(f"{task.id}: the teacher told no {'top logprobs' if top_k else 'tokens'} with its answer")
        columns = top_k_columns([None] * len(prompt) + list(answer.top), top_k) if top_k else {}
        mask = (False,) * len(prompt) + (True,) * len(answer.tokens)
        if len(tokens) <= max_length:
            sequence = TokenSequence(tokens=tokens, mask=mask, columns=columns)
            examples.append(Example(id=f"{task.id}/{answer.index}", sequences=(sequence,)))
    return examples


async def only_right(
    tasks: Sequence[Task], answers: Sequence[Sequence[TeacherAnswer]], grader: Grader
) -> list[list[TeacherAnswer]]:
    """The answers that get full marks."""
    flat = [(task, answer) for task, own in zip(tasks, answers, strict=True) for answer in own]
    grades = await grade_all(grader, [trajectory_from_text(task, a.text) for task, a in flat])
    right = {
        (task.id, answer.index)
        for (task, answer), grade in zip(flat, grades, strict=True)
        if (grade.score or 0.0) >= 1.0
    }
    return [
        [answer for answer in own if (task.id, answer.index) in right] for task, own in zip(tasks, answers, strict=True)
    ]
