"""Llama 3's post-training: reward model, rejection sampling, SFT, DPO and an average of models, round after round.

Grattafiori et al., https://arxiv.org/abs/2407.21783, section 4. In every round the newest model and the one before it
both answer fresh prompts, and people (here a grader that stands for them) say which answer is better: preferences for
training, and for nothing a win rate of the new model over the old. A reward model from the pre-trained one learns all
preferences so far; the newest model answers every prompt several times, and the reward model takes the best; the
pre-trained model imitates these; DPO with an NLL term and without the tokens that end a turn learns this round's
preferences; several such models are averaged. The round's model answers in the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from posttrain.core import Grader, Task, UsageError, generator, recipe
from posttrain.data import CompletionRow, PreferenceRow
from posttrain.grade import RewardModel
from posttrain.models import resolve
from posttrain.recipes.dpo import dpo, run_dpo
from posttrain.recipes.grading import grader_from
from posttrain.recipes.paper_data import ByFile, Data, Splits, completions, keep_data, load_tasks, sources_of, tasks_of
from posttrain.recipes.paper_evaluation import Evaluation, Measured
from posttrain.recipes.paper_pairs import Asking, Rated, best_and_lower, completion_of, rated_answers, win_rate
from posttrain.recipes.paper_settings import LLAMA3, settings_of
from posttrain.recipes.paper_stages import average_of, model_id, trained
from posttrain.recipes.policy import load_policy
from posttrain.recipes.rejection_sampling import RejectionSampling, sample_round
from posttrain.recipes.reward_model import reward_model, run_reward_model
from posttrain.recipes.reward_scoring import load_reward
from posttrain.recipes.sft import run_sft, sft
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench


@recipe
def llama3_rounds(
    *,
    model: str,
    prompts: tuple[str, ...],
    dev: tuple[str, ...],
    unseen: tuple[str, ...] = (),
    data: Path | None = None,
    grader: str = "number",
    annotator: str | None = None,
    size: Literal["published", "tiny"] = "published",
    rounds: int | None = None,
    samples: int | None = None,
    averaged: int | None = None,
    rm_lr: float | None = None,
    rm_batch: int | None = None,
    sft_lr: float | None = None,
    sft_epochs: float | None = None,
    sft_batch: int | None = None,
    dpo_lr: float | None = None,
    dpo_beta: float | None = None,
    dpo_batch: int | None = None,
    nll_coef: float | None = None,
    max_length: int | None = None,
    max_tokens: int | None = None,
    min_gap: float = 0.0,
    chat: bool = False,
    slots: int = 128,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Llama 3's rounds: reward model, rejection sampling, SFT, DPO, average of models; win rate of each over the last.

    Files of tasks are given as PATH, or PATH=GRADER where the file has another grader than `grader`.

    Args:
        model: folder of the pre-trained model, or a Hugging Face name; reward models and SFT begin with it.
        prompts: files of prompts; every round gets fresh ones, and the last win rate too.
        dev: files of tasks that every round's model is measured on.
        unseen: files of tasks that are asked once, at the end.
        data: prompts and completions by people, part of every round's SFT; the first model answers after SFT on them.
        grader: exact, number, maths, sql:DATABASE[,DATABASE], or FILE.py:NAME; evaluates.
        annotator: who stands for the people who compare answers (a grader, a judge, a pairwise judge); not given:
            the prompts' graders.
        size: whose settings to begin with: those published, or tiny.
        rounds: how many.
        samples: answers per prompt of which the reward model takes the best.
        averaged: DPO runs of every round, with other orders of the data, that are averaged.
        rm_lr: learning rate of the reward models.
        rm_batch: pairs per step of the reward models.
        sft_lr: learning rate of SFT.
        sft_epochs: epochs of SFT.
        sft_batch: examples per step of SFT.
        dpo_lr: learning rate of DPO.
        dpo_beta: pull to the round's SFT model.
        dpo_batch: pairs per step of DPO.
        nll_coef: weight of the chosen answer's negative log-likelihood.
        max_length: longer examples are left out, tokens.
        max_tokens: new tokens per answer, in training and evaluation.
        min_gap: pairs whose scores are nearer than this are left out.
        chat: make text prompts and completions turns of the chat template.
        slots: answers sampled at the same time.
        dtype: of the trainers' matrix products.
        device: cpu, cuda, cuda:0 …
        seed: of everything.
        runs: folder of runs.
        resume: run folder to go on with; stages that have finished are not repeated.
    """
    options: dict[str, Any] = dict(locals())
    settings = settings_of(LLAMA3, options)
    with open_workbench("llama3_rounds", options, runs=runs, resume=resume) as bench:
        # The evaluation first, then training data without it; the prompts in one part for each round and one more.
        measured = sources_of([*dev, *unseen], grader)
        splits = {
            "dev": load_tasks(measured[: len(dev)], chat=chat),
            "unseen": load_tasks(measured[len(dev) :], chat=chat),
        }
        sources = sources_of(prompts, grader)
        asked = tasks_of(bench, "prompts", sources, splits, chat=chat)
        parts = in_parts(asked.rows, settings["rounds"] + 1, seed)
        evaluation = Evaluation(bench, splits, ByFile(measured), settings["max_tokens"], device=device, slots=slots)
        written = None
        if data is not None:
            read = data  # for the closure
            written = keep_data(bench, "written", CompletionRow, lambda: completions(read, chat), splits, origin=[read])
        rounds_of = Rounds(
            bench,
            resolve(model),
            asked,
            written,
            grader_from(annotator) if annotator else ByFile(sources),
            splits,
            settings,
        )

        models = [rounds_of.first()]
        for number in range(1, settings["rounds"] + 1):
            models.append(rounds_of.turn(number, models, parts[:number]))
            for split in ("dev",) if dev else ():
                evaluation.report(models[-1], split)
        rounds_of.compare(settings["rounds"] + 1, models, parts[-1])

        evaluation.finish(
            models,
            title=f"Llama 3's rounds from {Path(model).name}",
            notes=[f"{asked.num_dropped} prompts gave evaluation tasks away and were dropped.", *rounds_of.win_rates],
            curves=rounds_of.stages,
        )
        return models[-1].folder


class Rounds:
    """What every round does, with what has come together so far."""

    def __init__(
        self,
        bench: Workbench,
        base: Path,
        prompts: Data[Task],
        written: Data[CompletionRow] | None,
        annotator: Grader,
        splits: Splits,
        settings: Mapping[str, Any],
    ) -> None:
        self.bench, self.base, self.prompts, self.written = bench, base, prompts, written
        self.annotator, self.splits, self.settings = annotator, splits, settings
        self.pairs: list[PreferenceRow] = []  # of all rounds
        self.pair_ids: list[str] = []
        self.stages: list[str] = []
        self.win_rates: list[str] = []
        self.train = {name: settings[name] for name in ("device", "dtype", "seed")}
        model_id(bench, base)  # in the lineage from the beginning

    def first(self) -> Measured:
        """The model that answers first: the pre-trained one, after SFT on what people have written if there is any."""
        if self.written is None:
            return Measured("start", self.base)
        return Measured("start", self._sft("start", self.written))

    def turn(self, number: int, models: Sequence[Measured], parts: Sequence[Sequence[Task]]) -> Measured:
        """One round.

        Args:
            number: from 1.
            models: so far, the newest last.
            parts: prompts of the rounds so far; the last part is fresh.
        """
        own = self.settings
        fresh = self.preferences(number, models, parts[-1])
        reward = self.reward(number)
        best = self.best_answers(number, models[-1], reward, [task for part in parts for task in part])
        tuned = self._sft(f"sft-{number}", best)
        aligned = [
            self._trained(
                f"dpo-{number}-{place}",
                dpo,
                run_dpo,
                model=str(tuned),
                data=fresh.path,
                loss="rpo",  # beside the NLL, the tokens that end a turn are left out of the preference term
                lr=own["dpo_lr"],
                beta=own["dpo_beta"],
                nll_coef=own["nll_coef"],
                batch_size=own["dpo_batch"],
                seed=own["seed"] + place,
            )
            for place in range(1, own["averaged"] + 1)
        ]
        return Measured(f"round-{number}", average_of(self.bench, f"round-{number}", aligned))

    def compare(self, number: int, models: Sequence[Measured], tasks: Sequence[Task]) -> list[Rated]:
        """The newest model and the one before it answer (the first answers twice); the annotator says who is better."""
        own, seed = self.settings, self.settings["seed"]
        pool = {one.name: one.folder for one in models[-2:]}
        asking = Asking(3 - len(pool), own["max_tokens"], slots=own["slots"], seed=seed + number, device=own["device"])
        rated = rated_answers(self.bench, f"rated-{number}", pool, tasks, self.annotator, asking)
        if len(pool) == 2:
            old, new = pool
            rate = win_rate(rated, new, old, seed=seed)
            self.win_rates.append(
                f"Win rate of {new} over {old} on {rate.n} fresh prompts, ties counted half: {rate.value:.1%} "
                f"[{rate.low:.1%}, {rate.high:.1%}]"
            )
            self.bench.say(self.win_rates[-1])
        return rated

    def preferences(self, number: int, models: Sequence[Measured], tasks: Sequence[Task]) -> Data[PreferenceRow]:
        """A round's pairs; the reward model learns from those of all rounds."""
        own = self.settings
        rated = self.compare(number, models, tasks)
        pairs = best_and_lower(rated, seed=own["seed"], min_gap=own["min_gap"])
        parents = [self.prompts.id, *(model_id(self.bench, one.folder) for one in models[-2:])]
        fresh = keep_data(self.bench, f"pairs-{number}", PreferenceRow, lambda: pairs, self.splits, parents=parents)
        self.bench.say(f"round {number}: {len(fresh.rows)} pairs from {len(tasks)} prompts")
        self.pairs += fresh.rows
        self.pair_ids.append(fresh.id)
        return fresh

    def reward(self, number: int) -> Path:
        """A reward model on top of the pre-trained one, from all preferences so far, without margins (4.1.2)."""
        every = keep_data(
            self.bench,
            f"all-pairs-{number}",
            PreferenceRow,
            lambda: self.pairs,
            self.splits,
            parents=self.pair_ids,
        )
        return self._trained(
            f"reward-{number}",
            reward_model,
            run_reward_model,
            model=str(self.base),
            data=every.path,
            lr=self.settings["rm_lr"],
            epochs=self.settings["rm_epochs"],
            batch_size=self.settings["rm_batch"],
            held_out=len(every.rows) // 10,
        )

    def best_answers(self, number: int, newest: Measured, reward: Path, tasks: Sequence[Task]) -> Data[CompletionRow]:
        """Rejection sampling (4.2.2): of K answers the one that the reward model likes best; and what people wrote."""
        own = self.settings
        names = ("samples", "max_tokens", "slots", "seed")
        config = RejectionSampling(keep="best", per_prompt=1, **{name: own[name] for name in names})

        def make() -> list[CompletionRow]:
            policy = load_policy(str(newest.folder), device=own["device"])
            judge = RewardModel(load_reward(str(reward), device=own["device"]).scorer(inline=True), "reward")
            chosen, _ = asyncio.run(sample_round(self.bench, policy, tasks, judge, config, number))
            return [*(completion_of(kept) for kept in chosen), *(self.written.rows if self.written else [])]

        ids = [self.prompts.id, *([self.written.id] if self.written else [])]
        parents = [*ids, model_id(self.bench, newest.folder), model_id(self.bench, reward)]
        return keep_data(self.bench, f"best-{number}", CompletionRow, make, self.splits, parents=parents)

    def _sft(self, name: str, data: Data[CompletionRow]) -> Path:
        """The pre-trained model imitates answers (4.1.3)."""
        own = self.settings
        more = {"lr": own["sft_lr"], "epochs": own["sft_epochs"], "batch_size": own["sft_batch"], "held_out": 0}
        return self._trained(name, sft, run_sft, model=str(self.base), data=data.path, **more)

    def _trained(self, name: str, *work: Any, **given: Any) -> Path:
        self.stages.append(name)
        every = {"max_length": self.settings["max_length"], "held_out": 0, **self.train}
        return trained(self.bench, name, *work, **{**every, **given})


def in_parts(tasks: Sequence[Task], num: int, seed: int) -> list[list[Task]]:
    """The tasks, shuffled, in so many parts of about one size.

    Raises:
        UsageError: a part would have fewer than two.
    """
    if len(tasks) < 2 * num:
        raise UsageError(
            f"{len(tasks)} prompts are too few for {num} parts: a part for each round and one for the last"
        )
    order = list(tasks)
    generator(seed, "parts").shuffle(order)
    return [order[place::num] for place in range(num)]
