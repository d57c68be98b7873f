"""Settings of the loop of group-relative reinforcement learning, and the published variants as presets of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from posttrain.core import Config, ConfigError, doc

Advantage = Literal[
    "group", "group_batch_std", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline", "max_rl", "decoupled"
]
SurrogateName = Literal["clip", "cispo", "sapo", "vespo", "reinforce"]
Ratio = Literal["token", "sequence", "sequence_token", "sequence_product"]
Mean = Literal["token", "sequence", "sequence_sum", "group", "constant"]
Variant = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "max_rl"]


class Grpo(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the loop."""

    steps: Annotated[int, doc("sampling steps", ge=1)]
    prompts_per_step: Annotated[int, doc("P, prompts per step", ge=1)]
    group_size: Annotated[int, doc("G, answers per prompt", ge=2)]
    max_tokens: Annotated[int, doc("new tokens per answer", ge=1)]
    lr: Annotated[float, doc("learning rate")]
    warmup: Annotated[float, doc("below 1 a fraction of the steps, else steps")] = 0.0
    schedule: Annotated[Literal["linear", "cosine", "constant"], doc("course of the learning rate")] = "constant"
    temperature: Annotated[float, doc("of sampling, and of the policy in the loss", gt=0)] = 1.0
    scale_rewards: Annotated[bool, doc("divide advantages by the group's standard deviation")] = False
    clip_low: Annotated[float, doc("epsilon below 1")] = 0.2
    clip_high: Annotated[float, doc("epsilon above 1; DAPO 0.28")] = 0.28
    beta: Annotated[float, doc("weight of the KL to the starting model", ge=0)] = 0.0
    normalise: Annotated[Mean, doc("what the loss is a mean over")] = "token"
    importance_cap: Annotated[float | None, doc("truncated importance weights for sampler mismatch")] = 2.0
    kl_every: Annotated[int, doc("steps between measurements of the KL where beta is 0; 0: never", ge=0)] = 10
    max_failed: Annotated[float, doc("share of failed rollouts or grades that stops the run")] = 0.05
    evaluate_every: Annotated[int, doc("steps between evaluations on the held-out tasks; 0: never", ge=0)] = 20
    checkpoint_every: Annotated[int, doc("steps between checkpoints", ge=1)] = 20
    micro_tokens: Annotated[int, doc("tokens per packed micro-batch", ge=1)] = 8192
    dtype: Annotated[Literal["float32", "bfloat16"], doc("of the trainer's matrix products")] = "bfloat16"
    sampler_dtype: Annotated[Literal["float32", "bfloat16"], doc("of the sampler's weights")] = "float32"
    slots: Annotated[int, doc("answers sampled at the same time", ge=1)] = 256
    seed: Annotated[int, doc("decides the order of prompts and every sample")] = 0
    # The variants differ in these. Their defaults change nothing.
    advantage: Annotated[Advantage, doc("how an answer is compared with others")] = "group"
    surrogate: Annotated[SurrogateName, doc("what is maximised")] = "clip"
    ratio: Annotated[Ratio, doc("whose ratio is bounded")] = "token"
    dual_clip: Annotated[float | None, doc("bound on the ratio of bad tokens, above 1 + clip_high; usually 3")] = None
    kl_estimator: Annotated[Literal["k1", "k2", "k3"], doc("of the KL penalty")] = "k3"
    kl_in_reward: Annotated[bool, doc("take the KL off the reward, not into the loss")] = False
    kl_unbiased: Annotated[bool, doc("weigh the KL in the loss by the ratio: DeepSeek-V3.2")] = False
    importance_low: Annotated[float | None, doc("lower bound of the importance weights")] = None
    importance_bound: Annotated[Literal["truncate", "mask"], doc("weights out of bounds: cut, or 0 (IcePop)")] = (
        "truncate"
    )
    importance_level: Annotated[Literal["token", "sequence", "geometric"], doc("of which ratio weights are made")] = (
        "token"
    )
    stale_threshold: Annotated[float | None, doc("off-policy sequence masking, nats per token")] = None
    epochs: Annotated[int, doc("passes over a step's samples", ge=1)] = 1
    minibatches: Annotated[int, doc("optimiser steps per pass", ge=1)] = 1
    entropy_coef: Annotated[float, doc("weight of the entropy bonus; the first one with entropy_target", ge=0)] = 0.0
    entropy_target: Annotated[float | None, doc("adapt the bonus so that the entropy stays above it, nats")] = None
    entropy_delta: Annotated[float, doc("how fast it is adapted, per optimiser step", ge=0)] = 0.005
    entropy_max: Annotated[float, doc("largest adapted bonus", ge=0)] = 1.0
    entropy_share: Annotated[float, doc("share of tokens, by entropy, that learn; 1: all", gt=0, le=1)] = 1.0
    over_long_buffer: Annotated[int, doc("tokens before max_tokens over which a penalty grows to 1; 0: none", ge=0)] = 0
    eos_penalty: Annotated[float, doc("taken off the reward of an answer that did not end", ge=0)] = 0.0
    mask_clipped: Annotated[bool, doc("leave answers that did not end out of the loss")] = False
    keep_zero: Annotated[bool, doc("count answers without advantage in what the loss is a mean over")] = False
    dynamic_rounds: Annotated[int, doc("rounds in which groups without variance are replaced; 0: none are", ge=0)] = 0
    curriculum: Annotated[bool, doc("favour prompts that are sometimes solved")] = False
    curriculum_low: Annotated[float, doc("lowest running pass rate that is favoured", ge=0, le=1)] = 0.05
    curriculum_high: Annotated[float, doc("highest running pass rate that is favoured", ge=0, le=1)] = 0.9
    full_marks: Annotated[float, doc("score that counts as solved, for pass rates", gt=0)] = 1.0
    reference_every: Annotated[int, doc("steps after which the reference becomes the policy; 0: never", ge=0)] = 0
    reference_mix: Annotated[float, doc("how much of it does; TR-DPO 0.6", gt=0, le=1)] = 1.0
    kl_prompts: Annotated[int, doc("fixed prompts on which the KL to the start is measured at the end", ge=0)] = 0
    kl_spent_every: Annotated[int, doc("and every so many steps; 0: only at the end", ge=0)] = 0

    def __post_init__(self) -> None:
        rules = [
            (self.kl_in_reward and self.beta == 0, "kl_in_reward needs beta above 0"),
            (self.kl_in_reward and self.advantage == "decoupled", "kl_in_reward needs one reward, not several"),
            (self.over_long_buffer > self.max_tokens, "over_long_buffer is more than max_tokens"),
            (
                self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high,
                "dual_clip must exceed 1 + clip_high",
            ),
            (
                self.advantage == "max_rl" and (self.eos_penalty or self.over_long_buffer),
                "max_rl divides by the mean reward and takes no penalties",
            ),
            (self.curriculum_low > self.curriculum_high, "curriculum_low is above curriculum_high"),
        ]
        broken = [rule for wrong, rule in rules if wrong]
        if broken:
            raise ConfigError(f"grpo: {'; '.join(broken)}")

    @property
    def updates(self) -> int:
        """Optimiser steps per sampling step."""
        return self.epochs * self.minibatches

    def measures_kl_at(self, step: int) -> bool:
        """The KL to the start is measured on the fixed prompts after so many steps."""
        due = step == self.steps or (self.kl_spent_every > 0 and step % self.kl_spent_every == 0)
        return self.kl_prompts > 0 and due

    @property
    def keeps_zero(self) -> bool:
        """Answers without advantage are trained on: for their KL or entropy, or because they count."""
        return self.keep_zero or self.kl_in_loss > 0 or self.entropy_coef > 0 or self.entropy_target is not None

    @property
    def kl_in_loss(self) -> float:
        """Weight of the KL penalty in the loss."""
        return 0.0 if self.kl_in_reward else self.beta


VARIANTS: dict[str, dict[str, Any]] = {
    # DeepSeekMath, arXiv 2402.03300, sections 4.1 and 4.2: KL 0.04 in the loss (k3), mean of each answer's mean.
    "grpo": {
        "scale_rewards": True,
        "normalise": "sequence",
        "clip_high": 0.2,
        "beta": 0.04,
        "keep_zero": True,
    },
    # Dr. GRPO, arXiv 2503.20783, section 3.2: no standard deviation, constant length, no KL.
    "dr_grpo": {"normalise": "constant", "clip_high": 0.2, "keep_zero": True},
    # DAPO, arXiv 2503.14476, sections 3 and 4.1: clip-higher, token-level loss, dynamic sampling, 16 updates per step,
    # over-long buffer a fifth of the longest answer (`with_variant` sets it), no KL.
    "dapo": {"scale_rewards": True, "clip_high": 0.28, "dynamic_rounds": 10, "minibatches": 16},
    # GSPO, arXiv 2507.18071, section 5.1: sequence ratio, clip 3e-4 and 4e-4, four minibatches, no KL.
    "gspo": {
        "scale_rewards": True,
        "ratio": "sequence",
        "normalise": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "minibatches": 4,
        "keep_zero": True,
    },
    # CISPO: MiniMax-M1, arXiv 2506.13585, section 3.1; bound 5 on the ratio, token-level loss: ScaleRL, 2510.13786.
    "cispo": {"scale_rewards": True, "surrogate": "cispo", "clip_high": 4.0, "keep_zero": True},
    # RLOO: Ahmadian et al., arXiv 2402.14740: an answer is one action, its KL (k1) part of the reward; beta TRL's.
    "rloo": {
        "advantage": "rloo",
        "ratio": "sequence_product",
        "normalise": "sequence",
        "clip_high": 0.2,
        "beta": 0.05,
        "kl_in_reward": True,
        "kl_estimator": "k1",
        "keep_zero": True,
    },
    # REINFORCE++, arXiv 2501.03262, section 3: KL (k1) token by token in the reward, normalised over the step.
    "reinforce_pp": {
        "advantage": "reinforce_pp",
        "clip_high": 0.2,
        "beta": 0.01,
        "kl_in_reward": True,
        "kl_estimator": "k1",
        "keep_zero": True,
    },
    # MaxRL, arXiv 2602.02710: over the group's mean instead of its standard deviation; on policy, no KL.
    "max_rl": {"advantage": "max_rl", "keep_zero": True},
}
"""What each published variant sets; everything else is as in `Grpo`."""


def with_variant(variant: str | None, options: Mapping[str, Any]) -> Grpo:
    """The settings of a variant, overridden by every option that is not None.

    Args:
        variant: a key of `VARIANTS`; None: `Grpo`'s own defaults.
        options: fields of `Grpo`; other names are left out. `importance_cap` 0 means None: no importance weights.

    Raises:
        ConfigError: no such variant, or a value out of its range.
    """
    if variant is not None and variant not in VARIANTS:
        raise ConfigError(f"no variant {variant!r}: choose {', '.join(VARIANTS)}")
    given = {name: options[name] for name in Grpo.__struct_fields__ if options.get(name) is not None}
    values = {**(VARIANTS[variant] if variant else {}), **given}
    if variant == "dapo" and "over_long_buffer" not in given:
        values["over_long_buffer"] = max(1, int(values["max_tokens"]) // 5)  # 4,096 of 20,480
    if values.get("importance_cap") == 0:
        values["importance_cap"] = None
    return Grpo.from_dict(values)
