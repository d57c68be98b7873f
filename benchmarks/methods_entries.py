"""Every method of the project as one entry: which recipe, with which options, on which data of the small world.

The learning rates are those of a model of a tenth of a million weights, a thousand times those of the papers.
Preference methods pull harder to the start than their papers' (`BETA`). All else is each method's own default, cut to a
budget of under a minute; where an entry needed more than that, its note says so below the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods_world import MAX_TOKENS, World

from posttrain.recipes.preference_methods import METHODS
from posttrain.recipes.rl_settings import VARIANTS

Options = Callable[[World, Mapping[str, Path]], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    name: str
    family: str  # supervised, distillation, preference, online, reward, adapter, merging
    recipe: str
    learns_from: str
    options: Options  # from the world and the models of earlier entries
    needs: tuple[str, ...] = ()  # earlier entries
    report: str = ""  # of reward models: the run's report, instead of a policy's evaluation
    note: str = ""  # in what the settings are not the method's own; stands below the table


def _fixed(file: str, **values: Any) -> Options:
    def options(world: World, models: Mapping[str, Path]) -> dict[str, Any]:
        return {"model": str(world.start), "data": world.file(file), "dtype": "float32", **values}

    return options


def _taught(**values: Any) -> Options:
    def options(world: World, models: Mapping[str, Path]) -> dict[str, Any]:
        return {**_fixed("prompts", **values)(world, models), "teacher": str(world.teacher)}

    return options


def _merged(method: str, *names: str, **values: Any) -> Options:
    def options(world: World, models: Mapping[str, Path]) -> dict[str, Any]:
        base = {} if method in ("average", "slerp", "ema") else {"base": str(world.start)}
        return {"models": [str(models[name]) for name in names], "method": method, **base, **values}

    return options


SFT: dict[str, Any] = {"epochs": 4.0, "batch_size": 32, "held_out": 0, "lr": 1e-3}
PAIRS: dict[str, Any] = {"epochs": 6.0, "batch_size": 32, "held_out": 0, "lr": 1e-4}
# Answers of five tokens that differ in two: with the 0.1 of the papers a pair's gap may grow by tens of nats, all of
# them on those two, and where the right answer falls with the wrong one there is little left to gain.
BETA = 1.0
RL: dict[str, Any] = {
    "grader": "exact",
    "steps": 40,
    "prompts_per_step": 16,
    "group_size": 8,
    "max_tokens": MAX_TOKENS,
    "lr": 3e-4,
}
REWARD: dict[str, Any] = {"epochs": 4.0, "batch_size": 32, "held_out": 100, "lr": 1e-3}
TAUGHT: dict[str, Any] = {
    "limit": 400,
    "max_tokens": MAX_TOKENS,
    "epochs": 3.0,
    "batch_size": 32,
    "held_out": 0,
    "lr": 1e-3,
}
ON_POLICY: dict[str, Any] = {"steps": 60, "prompts_per_step": 16, "samples": 4, "max_tokens": MAX_TOKENS, "lr": 3e-4}
LORA: dict[str, Any] = {"lora_rank": 8, "lora_alpha": 16.0, "lr": 5e-3}


def entries() -> list[Entry]:
    """All rows, in the order in which they run."""
    return [*_supervised(), *_distillation(), *_preference(), *_online(), *_reward(), *_merging()]


def _supervised() -> list[Entry]:
    learned = "256 right answers"
    return [
        Entry("continued pre-training", "supervised", "pretrain", "documents without mistakes", _more_pretraining),
        Entry("sft", "supervised", "sft", learned, _fixed("gold", **SFT)),
        Entry("sft, LoRA", "adapter", "sft", learned, _fixed("gold", **SFT | LORA)),
        Entry("sft, DoRA", "adapter", "sft", learned, _fixed("gold", **SFT | LORA, dora=True)),
        Entry(
            "rejection sampling",
            "supervised",
            "rejection_sampling",
            "its own right answers, 800 prompts × 4",
            _fixed("prompts", grader="exact", samples=4, per_prompt=1, max_tokens=MAX_TOKENS, epochs=2.0, lr=1e-3),
        ),
        Entry(
            "expert iteration, 3 rounds",
            "supervised",
            "rejection_sampling",
            "its own right answers, 300 prompts × 4 × 3",
            _fixed(
                "prompts",
                limit=300,
                grader="exact",
                samples=4,
                rounds=3,
                per_prompt=1,
                max_tokens=MAX_TOKENS,
                epochs=2.0,
                lr=1e-3,
            ),
        ),
    ]


def _more_pretraining(world: World, models: Mapping[str, Path]) -> dict[str, Any]:
    return {**_fixed("documents", epochs=3.0, batch_size=64, held_out=0, lr=1e-3)(world, models), "max_length": 32}


def _distillation() -> list[Entry]:
    answers, samples = "a teacher's answers to 400 prompts", "its own answers, a teacher's word on each token"
    offline = {
        "distill, sequence level": {"loss": "nll"},
        "distill, forward KL": {"loss": "forward_kl"},
        "distill, reverse KL": {"loss": "reverse_kl"},
        "distill, JSD": {"loss": "jsd"},
        "distill, top 4 and a tail": {"loss": "forward_kl", "top_k": 4},
    }
    online = {
        "on-policy distillation, policy gradient": {"loss": "policy"},
        "on-policy distillation, reverse KL": {"loss": "reverse_kl"},
        "on-policy distillation, JSD (GKD)": {"loss": "jsd"},
    }
    return [
        *(Entry(name, "distillation", "distill", answers, _taught(**TAUGHT, **own)) for name, own in offline.items()),
        *(
            Entry(name, "distillation", "on_policy_distill", samples, _taught(**ON_POLICY, **own))
            for name, own in online.items()
        ),
    ]


@dataclass(frozen=True)
class Suited:
    """In what an entry of pairs differs from the others."""

    options: dict[str, Any]
    note: str
    file: str = "pairs"
    learns_from: str = "pairs of its own right and wrong answers"


SUITED = {
    "orpo": Suited(
        {"lr": SFT["lr"]},
        "ORPO is fine-tuning with a penalty: its authors' rate is 16 times DPO's, and here it is that of SFT.",
    ),
    "apo_down": Suited(
        {"beta": 2.0, "epochs": 10.0},
        "made for models that are better than what is chosen, so both answers of its pairs are wrong; β 2 instead of "
        "0.1, because it lowers the chosen answer too.",
        file="lesser_pairs",
        learns_from="pairs of its own wrong answers, one nearer",
    ),
    "aot": Suited(
        {"beta": 2.0, "epochs": 4.0}, "β 2 and four epochs instead of six: with sorted pairs it goes further."
    ),
    "aot_unpaired": Suited({"beta": 3.0, "epochs": 4.0}, "β 3 and four epochs, for the same reason."),
    "simpo": Suited({"beta": 5.0, "gamma": 4.0}, "β 5 and γ 4 instead of 2 and 1.6, the same ratio."),
    "discopop": Suited(
        {"beta": 2.0, "lr": 3e-4, "epochs": 4.0},
        "β 2, not the published 0.05, with which it loses 14 points here and 22 at ten times the rate: at τ 0.05 the "
        "loss first lowers the margin, and has a maximum at β · margin 0.07: at 1.4 nats with β 0.05, at 0.04 with 2.",
    ),
    "sppo_hard": Suited({"beta": 0.1}, "β 0.1: each answer is to move by 1 / 2β, 5 nats instead of the published 500."),
}


def _preference() -> list[Entry]:
    labels = "its own answers, labelled"
    own_pairs = Suited({}, "")

    def of_pairs(loss: str) -> Entry:
        suited, method = SUITED.get(loss, own_pairs), METHODS[loss]
        beta = {"beta": BETA} if method.reference and method.beta < BETA else {}
        options = {**PAIRS, **beta, **suited.options}
        made = _fixed(suited.file, loss=loss, **options)
        return Entry(_dpo_name(loss), "preference", "dpo", suited.learns_from, made, note=suited.note)

    adapters = PAIRS | {"lora_rank": 8, "lr": 3e-4, "beta": BETA}
    labelled = PAIRS | {"epochs": 3.0, "beta": BETA}
    return [
        *map(of_pairs, METHODS),
        Entry("dpo, LoRA", "adapter", "dpo", own_pairs.learns_from, _fixed("pairs", **adapters)),
        *(Entry(loss, "preference", "kto", labels, _fixed("labels", loss=loss, **labelled)) for loss in ("kto", "bco")),
        Entry(
            "online dpo",
            "preference",
            "online_dpo",
            "its own answers, ranked by a grader",
            _fixed(
                "prompts",
                grader="exact",
                rounds=30,
                prompts_per_round=16,
                group_size=8,
                max_tokens=MAX_TOKENS,
                batch_size=16,
                lr=3e-4,
            ),
        ),
    ]


def _dpo_name(loss: str) -> str:
    alone = {"simpo", "cpo", "orpo", "ipo", "wpo", "mpo", "rpo"}
    return "dpo" if loss == "sigmoid" else loss if loss in alone else f"dpo, {loss}"


def _online() -> list[Entry]:
    graded = "its own answers, graded"
    ppo = {**RL, "prompts_per_step": 64, "group_size": 2, "value_lr": 1e-3, "epochs": 2, "value_warmup": 5}
    return [
        *(Entry(variant, "online", "grpo", graded, _fixed("prompts", variant=variant, **RL)) for variant in VARIANTS),
        Entry("ppo", "online", "ppo", graded, _fixed("prompts", **ppo)),
    ]


def _reward() -> list[Entry]:
    return [
        Entry(
            "reward model",
            "reward",
            "reward_model",
            "pairs of its own right and wrong answers",
            _fixed("pairs", **REWARD),
            report="reward_report.json",
        ),
        Entry(
            "process reward",
            "reward",
            "process_reward",
            "its own answers, each letter labelled",
            _fixed("steps", separator="", **REWARD),
            report="step_report.json",
        ),
    ]


def _merging() -> list[Entry]:
    both = ("sft", "dpo")
    return [
        Entry(f"merge, {method}", "merging", "merge", "the weights of sft and dpo", _merged(method, *both), both)
        for method in ("average", "slerp", "task", "ties", "dare")
    ]
