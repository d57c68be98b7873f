"""Ten judges score a GRPO run while it samples, and the sampler does not wait for them.

    posttrain run examples/judge_panel/judge_panel.py

The judges are scripts that take as long as served ones: log-normal around a second. The same small run is done in
pairs, with a grader that answers at once and with the panel asked group by group while the rest of the step and the
next step are sampled (one step off policy), turn and turn about. Printed are, as medians over the pairs, what it costs
the sampler: its wall time, and the processor's time while it samples, which other work on the machine changes least.
Last the panel is asked after each step's sampling, once: what waiting would have cost. The policy is not the point.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import posttrain as pt
from posttrain.core import Grader, Message
from posttrain.grade import BinaryJudge, Function, Graded, JudgeModel, Panel, ScriptedChat, grade_while
from posttrain.grade.judge_prompt import unfenced
from posttrain.objectives import group_advantages
from posttrain.recipes.group_stream import stream_groups
from posttrain.recipes.policy import Policy
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.workbench import RUNS, open_workbench
from posttrain.rollout import Group, to_examples

WORDS = "ant bee cat dog elk fox gnu hen".split()


def share_of_vowels(text: str) -> float:
    """What the judges care for; any rule in which random answers differ will do."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


def scripted_judge(place: int, median_s: float) -> BinaryJudge:
    """A judge with its own bar and its own clock."""
    clock = random.Random(place)

    def reply(messages: Sequence[Message]) -> str:
        share = share_of_vowels(unfenced(messages[-1].content, "answer"))
        return json.dumps({"rationale": f"vowels: {share:.2f}", "meets": share > 0.02 * place})

    chat = ScriptedChat(reply, latency_s=lambda: clock.lognormvariate(0.0, 0.5) * median_s, model=f"judge-{place}")
    return BinaryJudge(JudgeModel(chat), "The answer is full of vowels.", name=f"judge_{place}")


class Run:
    """One small GRPO run, and the seconds that it took."""

    def __init__(self, policy: Policy, tasks: Sequence[pt.Task], grader: Grader, steps: int, max_tokens: int) -> None:
        self.policy, self.tasks, self.grader, self.steps = policy, tasks, grader, steps
        self.sampling = pt.Sampling(max_tokens=max_tokens, n=8, ignore_eos=True)  # the same work in every run
        config = pt.train.TrainConfig(lr=1e-4, total_steps=steps, dtype="float32", schedule="constant")
        self.trainer = pt.train.Trainer(policy.model, config, pt.train.policy_objective(importance_cap=2.0))
        self.engine = policy.engine(slots=8 * len(tasks), length=policy.length_for(tasks, max_tokens))
        self.sampling_s, self.sampler_cpu_s, self.wall_s, self.cpu_s, self.num_tokens = 0.0, 0.0, 0.0, 0.0, 0
        self.latencies_s: list[float] = []

    async def sampled(self, whole: bool) -> AsyncIterator[list[Group]]:
        """Groups one by one as they are done, or a step's groups together (`whole`)."""
        for step in range(self.steps):
            started_s, cpu_s = time.perf_counter(), time.process_time()
            prompt = self.policy.renderer.prompt
            stream = stream_groups(self.engine, self.tasks, self.sampling, prompt_tokens=prompt, seed=0, step=step)
            held: list[Group] = []
            left = len(self.tasks)
            async for group in stream:
                left -= 1
                if left == 0:
                    self.sampling_s += time.perf_counter() - started_s
                    self.sampler_cpu_s += time.process_time() - cpu_s
                held.append(group)
                if left == 0 or not whole:
                    yield held
                    held = []

    async def go(self, *, overlap: bool) -> "Run":
        """Sample, grade, train. Without overlap every step waits for its grades before anything else is done."""
        started_s, cpu_s = time.perf_counter(), time.process_time()
        ahead = len(self.tasks) if overlap else 0
        come = self.sampled(whole=not overlap)
        step: list[Graded[list[Group]]] = []
        async for graded in grade_while(come, self.grader, trajectories_of, concurrency=1024, ahead=ahead):
            step.append(graded)
            if sum(len(part.batch) for part in step) == len(self.tasks):
                await self.train(step)
                step = []
        self.wall_s, self.cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
        self.engine.close()
        return self

    async def train(self, step: Sequence[Graded[list[Group]]]) -> None:
        """One step; in a thread, so that judges are listened to meanwhile."""
        import torch

        groups = [group for part in step for group in part.batch]
        grades = [grade for part in step for grade in part.grades]
        pt.grade.check_failures(grades)
        self.latencies_s += [grade.seconds for grade in grades]
        self.num_tokens += sum(t.num_completion_tokens() for group in groups for t in group.trajectories)
        rewards_PG = torch.tensor([grade.score for grade in grades], dtype=torch.float64).view(len(groups), -1)
        examples = to_examples(groups, group_advantages(rewards_PG, std=False).tolist())
        await asyncio.to_thread(self.trainer.step, examples)
        self.engine.update_weights(self.policy.model, version=self.trainer.num_steps)

    def row(self, name: str) -> dict[str, float | str]:
        """What is printed."""
        return {
            "run": name,
            "wall_s": round(self.wall_s, 2),
            "cpu_s": round(self.cpu_s, 2),
            "sampler_s": round(self.sampling_s, 2),
            "sampler_cpu_s": round(self.sampler_cpu_s, 2),
            "sampler_tokens_per_s": round(self.num_tokens / self.sampling_s, 1),
            "grade_median_s": round(statistics.median(self.latencies_s), 3),
            "grade_longest_s": round(max(self.latencies_s), 3),
        }


def trajectories_of(groups: Sequence[Group]) -> list[pt.Trajectory]:
    """A batch's trajectories, group by group."""
    return [trajectory for group in groups for trajectory in group.trajectories]


@pt.recipe
def judge_panel(
    *,
    pairs: int = 5,
    steps: int = 4,
    prompts: int = 8,
    max_tokens: int = 192,
    judges: int = 10,
    median_s: float = 1.0,
    width: int = 192,
    seed: int = 0,
    runs: Path = RUNS,
) -> list[dict[str, float | str]]:
    """Measure what a panel of judges that is asked while sampling costs a GRPO run.

    Args:
        pairs: runs without and with the panel.
        steps: GRPO steps of each run.
        prompts: prompts per step, 8 answers each.
        max_tokens: tokens of every answer.
        judges: judges in the panel.
        median_s: median seconds of a judge's answer; log-normal with sigma 0.5.
        width: of the policy, a decoder of 4 layers.
        seed: of its weights.
        runs: folder of runs.
    """
    import torch

    torch.set_num_threads(1)  # a second one would wait at barriers, and be counted
    options = {"pairs": pairs, "steps": steps, "prompts": prompts, "max_tokens": max_tokens, "judges": judges}
    tasks = [pt.Task(id=str(place), prompt=f"{place} words:") for place in range(prompts)]
    rows: list[dict[str, float | str]] = []
    with open_workbench(
        "judge_panel", {**options, "median_s": median_s, "width": width, "seed": seed}, runs=runs
    ) as bench:

        def one(name: str, *, overlap: bool = True) -> None:
            at_once = Function(lambda trajectory: share_of_vowels(trajectory.text), "at_once")
            panel = Panel([scripted_judge(place, median_s) for place in range(judges)], "mean")
            shape = {"vocab_size": 280, "width": width, "num_layers": 4, "num_heads": 4, "max_positions": 512}
            policy = new_policy(
                WORDS, **shape, seed=seed, path=bench.run.path / f"{name}-{len(rows)}".replace(" ", "_")
            )
            grader = at_once if name == "alone" else panel
            rows.append(asyncio.run(Run(policy, tasks, grader, steps, max_tokens).go(overlap=overlap)).row(name))
            bench.say("  ".join(f"{key} {value}" for key, value in rows[-1].items()))

        for pair in range(pairs):
            for name in ("alone", "panel while") if pair % 2 == 0 else ("panel while", "alone"):
                one(name)
        one("panel after", overlap=False)
        slower = slowdowns(rows)
        for what, text in (
            ("sampler_cpu_s", "the processor's time while sampling, judges' own included,"),
            ("sampler_s", "the sampler's wall time"),
            ("wall_s", "the run's wall time"),
            ("cpu_s", "the run's processor time, with the judges' own"),
        ):
            listed = ", ".join(f"{value:+.1%}" for value in slower[what])
            bench.say(f"{text} with {judges} judges: {statistics.median(slower[what]):+.1%} (pairs: {listed})")
        alone = statistics.median(float(row["wall_s"]) for row in rows if row["run"] == "alone")
        bench.say(
            f"waiting for the panel after each step's sampling: {float(rows[-1]['wall_s']) / alone - 1:+.1%} wall time"
        )
        return rows


def slowdowns(rows: Sequence[dict[str, float | str]]) -> dict[str, list[float]]:
    """Of each figure, for each pair, by what share it is larger with the panel than without."""
    found: dict[str, list[float]] = {}
    for what in ("sampler_cpu_s", "sampler_s", "wall_s", "cpu_s"):
        by_run = {name: [float(row[what]) for row in rows if row["run"] == name] for name in ("alone", "panel while")}
        both = zip(by_run["panel while"], by_run["alone"], strict=True)
        found[what] = [with_panel / without - 1 for with_panel, without in both if without > 0]
    return found
