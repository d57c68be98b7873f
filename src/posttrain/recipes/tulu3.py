"""Tülu 3: SFT, preferences on the model's own answers, length-normalised DPO, and RL with verifiable rewards.

Lambert et al., https://arxiv.org/abs/2411.15124. Training data is searched for the evaluation first. Then every stage
begins with the model of the one before: supervised fine-tuning; answers to prompts from the SFT model (and others),
rated, the best as chosen and a lower one as rejected; DPO on the mean log-ratio per token; PPO with a value model that
begins as a reward model, or GRPO as Tülu 3.1 did it, rewarded by verifiers alone. Where several learning rates are
given, each is tried and dev accuracy decides. The unseen split is asked once, when nothing is left to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from posttrain.core import Grader, Task, recipe
from posttrain.data import CompletionRow, PreferenceRow
from posttrain.grade import Weighted
from posttrain.models import resolve
from posttrain.recipes.dpo import dpo, run_dpo
from posttrain.recipes.grading import grader_from
from posttrain.recipes.paper_data import ByFile, Data, Splits, completions, keep_data, load_tasks, sources_of, tasks_of
from posttrain.recipes.paper_evaluation import Evaluation, Measured
from posttrain.recipes.paper_pairs import Asking, best_and_lower, rated_answers
from posttrain.recipes.paper_settings import TULU3, settings_of
from posttrain.recipes.paper_stages import model_id, reinforced, trained
from posttrain.recipes.ppo import Ppo
from posttrain.recipes.reward_model import reward_model, run_reward_model
from posttrain.recipes.rl_settings import Grpo, with_variant
from posttrain.recipes.sft import run_sft, sft
from posttrain.recipes.workbench import RUNS, Workbench, open_workbench

RL = ("lr", "beta", "prompts", "steps")  # what either loop has settings of


@recipe
def tulu3(
    *,
    model: str,
    data: Path,
    prompts: tuple[str, ...],
    dev: tuple[str, ...],
    unseen: tuple[str, ...],
    preference_prompts: tuple[str, ...] = (),
    grader: str = "number",
    rater: str | None = None,
    others: tuple[str, ...] = (),
    answers: int = 4,
    min_gap: float = 0.0,
    rl: Literal["ppo", "grpo"] = "ppo",
    size: Literal["8b", "70b", "tiny"] = "8b",
    sft_lr: tuple[float, ...] = (),
    sft_epochs: float | None = None,
    sft_batch: int | None = None,
    dpo_lr: tuple[float, ...] = (),
    dpo_beta: float | None = None,
    dpo_batch: int | None = None,
    rm_lr: float | None = None,
    rl_lr: tuple[float, ...] = (),
    rl_beta: float | None = None,
    rl_prompts: int | None = None,
    rl_steps: int | None = None,
    max_tokens: int | None = None,
    chat: bool = False,
    slots: int = 128,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    device: str = "cpu",
    seed: int = 0,
    runs: Path = RUNS,
    resume: Path | None = None,
) -> Path:
    """Tülu 3: SFT, on-policy preferences with length-normalised DPO, RL with verifiable rewards; dev and unseen.

    Files of tasks are given as PATH, or PATH=GRADER where the file has another grader than `grader`.

    Args:
        model: folder of the base model, or a Hugging Face name.
        data: prompts and completions for SFT, in any format that is recognised.
        prompts: files of tasks with answers that can be verified, for RL.
        dev: files of tasks that guide the run.
        unseen: files of tasks that are asked once, at the end.
        preference_prompts: files of prompts for the preferences; without any, those of `prompts`.
        grader: exact, number, maths, sql:DATABASE[,DATABASE], or FILE.py:NAME; verifies tasks.
        rater: who rates answers for the preferences (a judge, FILE.py:NAME …); not given: the tasks' verifiers.
        others: folders of further models that answer besides the SFT model.
        answers: answers per prompt of every model.
        min_gap: pairs whose scores are nearer than this are left out.
        rl: ppo (Tülu 3; its value model begins as a reward model) or grpo (Tülu 3.1).
        size: whose settings to begin with: those published for 8b or 70b, or tiny.
        sft_lr: learning rate of SFT; of several, dev decides.
        sft_epochs: epochs of SFT.
        sft_batch: examples per step of SFT.
        dpo_lr: learning rate of DPO; of several, dev decides.
        dpo_beta: pull to the SFT model.
        dpo_batch: pairs per step of DPO.
        rm_lr: learning rate of the reward model that PPO's value model begins as.
        rl_lr: learning rate of RL; of several, dev decides.
        rl_beta: weight of the KL to the DPO model.
        rl_prompts: prompts per step of RL.
        rl_steps: sampling steps of RL.
        max_tokens: new tokens per answer, in training and evaluation.
        chat: make text prompts and completions turns of the chat template.
        slots: answers sampled at the same time.
        dtype: of the trainers' matrix products.
        device: cpu, cuda, cuda:0 …
        seed: of everything.
        runs: folder of runs.
        resume: run folder to go on with; stages that have finished are not repeated.
    """
    options: dict[str, Any] = dict(locals())
    settings = settings_of(TULU3, options)
    settings |= {f"rl_{name}": settings[f"{rl}_{name}"] for name in RL if not options[f"rl_{name}"]}
    with open_workbench("tulu3", options, runs=runs, resume=resume) as bench:
        # The evaluation first, then training data without it.
        measured = sources_of([*dev, *unseen], grader)
        splits = {
            "dev": load_tasks(measured[: len(dev)], chat=chat),
            "unseen": load_tasks(measured[len(dev) :], chat=chat),
        }
        answered = keep_data(bench, "sft-data", CompletionRow, lambda: completions(data, chat), splits, origin=[data])
        verifiable = sources_of(prompts, grader)
        asked = tasks_of(bench, "rl-data", verifiable, splits, chat=chat)
        preferred = verifiable if not preference_prompts else sources_of(preference_prompts, grader)
        compared = asked if not preference_prompts else tasks_of(bench, "preference-data", preferred, splits, chat=chat)

        stages = Stages(
            bench,
            Evaluation(bench, splits, ByFile(measured), settings["max_tokens"], device=device, slots=slots),
            settings,
        )
        base = Measured("base", resolve(model))
        model_id(bench, base.folder)  # in the lineage from the beginning
        sft_model = stages.sft(base, answered)
        rate = grader_from(rater) if rater else ByFile(preferred)
        pairs = stages.preferences(sft_model, compared, rate, splits)
        dpo_model = stages.dpo(sft_model, pairs)
        rl_model = stages.reinforce(sft_model, dpo_model, pairs, asked, ByFile(verifiable))

        dropped = sum(kept.num_dropped for kept in (answered, asked, pairs))
        stages.evaluation.finish(
            [base, sft_model, dpo_model, rl_model],
            title=f"Tülu 3 from {base.folder.name}",
            notes=[f"{dropped} training rows gave evaluation tasks away and were dropped."],
            curves=[sft_model.name, dpo_model.name, rl_model.name],
        )
        bench.say(f"model {bench.registry.card(model_id(bench, rl_model.folder)).id[:12]} in {rl_model.folder}")
        return rl_model.folder


class Stages:
    """The four stages, each from the model of the one before; of several learning rates dev takes the best."""

    def __init__(self, bench: Workbench, evaluation: Evaluation, settings: Mapping[str, Any]) -> None:
        self.bench, self.evaluation, self.settings = bench, evaluation, settings
        self.train = {name: settings[name] for name in ("device", "dtype", "seed")}

    def sft(self, base: Measured, data: Data[CompletionRow]) -> Measured:
        """Supervised fine-tuning (section 4): a linear schedule, the loss a mean over all of a step's tokens."""
        own = self.settings
        return self._best(
            "sft",
            own["sft_lr"],
            lambda name, lr: trained(
                self.bench,
                name,
                sft,
                run_sft,
                model=str(base.folder),
                data=data.path,
                lr=lr,
                epochs=own["sft_epochs"],
                batch_size=own["sft_batch"],
                max_length=own["sft_length"],
                held_out=0,
                **self.train,
            ),
        )

    def preferences(self, tuned: Measured, prompts: Data[Task], rater: Grader, splits: Splits) -> Data[PreferenceRow]:
        """Answers of the SFT model and of others, rated; the best as chosen, a lower one as rejected (section 5.2)."""
        own, seed = self.settings, self.settings["seed"]
        pool = {"sft": tuned.folder} | {f"other-{place}": resolve(name) for place, name in enumerate(own["others"], 1)}
        asking = Asking(own["answers"], own["max_tokens"], slots=own["slots"], seed=seed, device=own["device"])

        def make() -> list[PreferenceRow]:
            rated = rated_answers(self.bench, "rated", pool, prompts.rows, rater, asking)
            pairs = best_and_lower(rated, seed=seed, min_gap=own["min_gap"])
            self.bench.say(f"{len(pairs)} pairs from {len(rated)} prompts; answers to the others were rated alike")
            return pairs

        parents = [prompts.id, *(model_id(self.bench, folder) for folder in pool.values())]
        return keep_data(self.bench, "pairs", PreferenceRow, make, splits, parents=parents)

    def dpo(self, start: Measured, pairs: Data[PreferenceRow]) -> Measured:
        """Length-normalised DPO (section 5.4.1): the log-ratios are means over an answer's tokens, so beta is large."""
        own = self.settings
        return self._best(
            "dpo",
            own["dpo_lr"],
            lambda name, lr: trained(
                self.bench,
                name,
                dpo,
                run_dpo,
                model=str(start.folder),
                data=pairs.path,
                loss="sigmoid_norm",
                beta=own["dpo_beta"],
                lr=lr,
                batch_size=own["dpo_batch"],
                max_length=own["pair_length"],
                held_out=0,
                **self.train,
            ),
        )

    def reinforce(
        self, tuned: Measured, start: Measured, pairs: Data[PreferenceRow], tasks: Data[Task], verifier: Grader
    ) -> Measured:
        """RL with verifiable rewards (section 6): a right answer is worth 10, every token pays for the KL."""
        own, value = self.settings, None
        if own["rl"] == "ppo":
            value = trained(
                self.bench,
                "reward-model",
                reward_model,
                run_reward_model,
                model=str(tuned.folder),
                data=pairs.path,
                lr=own["rm_lr"],
                epochs=own["rm_epochs"],
                batch_size=own["rm_batch"],
                max_length=own["pair_length"],
                held_out=len(pairs.rows) // 10,
                **self.train,
            )
        return self._best(
            own["rl"],
            own["rl_lr"],
            lambda name, lr: reinforced(
                self.bench,
                name,
                start.folder,
                tasks.rows,
                Weighted({verifier: own["reward"]}, name="verifiable"),
                rl_config(own, lr),
                data=tasks.id,
                value=value,
                dev=self.evaluation.dev_suite(start.folder),
                device=own["device"],
            ),
        )

    def _best(self, name: str, lrs: Sequence[float], train: Callable[[str, float], Path]) -> Measured:
        names = [name] if len(lrs) == 1 else [f"{name}-{place}" for place in range(1, len(lrs) + 1)]
        return self.evaluation.best([Measured(own, train(own, lr)) for own, lr in zip(names, lrs, strict=True)])


def rl_config(settings: Mapping[str, Any], lr: float) -> Grpo | Ppo:
    """Settings of the RL loop."""
    steps = settings["rl_steps"]
    both = {
        **{name: settings[name] for name in ("max_tokens", "slots", "dtype", "seed")},
        **{"lr": lr, "beta": settings["rl_beta"], "steps": steps, "prompts_per_step": settings["rl_prompts"]},
        **{"evaluate_every": max(1, steps // 10), "checkpoint_every": max(1, steps // 20), "kl_prompts": 32},
    }
    if settings["rl"] == "ppo":
        own = {
            "value_lr": lr,
            "schedule": "linear",
            "warmup": settings["ppo_warmup"],
            "eos_penalty": settings["reward"],
        }
        return Ppo.from_dict({**both, **own})
    own = {"group_size": settings["grpo_group"], "minibatches": settings["grpo_minibatches"]}
    return with_variant("grpo", {**both, **own})
