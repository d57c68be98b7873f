"""LoRA as recipes take it: a block of options, adapters on a policy, the reference without them, and what is written.

A recipe that trains `policy.model` takes it in three lines:

    options = dict(locals())                  # lora_rank, lora_alpha, lora_targets …
    policy = tuned_part(load_policy(model), Lora.of(options), seed=seed)
    reference = reference_of(policy, trainer) # where there is a KL: reference.logprobs(examples)
    tuned = save_tuned(policy, bench.run.path / "model")

and names in its signature whichever options of `Lora` it offers, each with the prefix `lora_` but for `rslora`, `dora`
and `four_bit`: what is not offered has its default.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Protocol

from posttrain import models
from posttrain.core import Config, ConfigError, Example, doc
from posttrain.recipes.policy import Policy
from posttrain.recipes.workbench import Workbench
from posttrain.train import Trainer

LR_FACTOR = 10.0
"""How much larger a learning rate adapters want than all weights ("LoRA Without Regret", Thinking Machines, 2025)."""


class Lora(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained: all weights, or adapters on them."""

    rank: Annotated[int, doc("of the adapters; 0: train all weights", ge=0)] = 0
    alpha: Annotated[float, doc("adapters count alpha / rank", gt=0)] = 32.0
    targets: Annotated[tuple[str, ...], doc("adapted projections, as q_proj,v_proj; none named: all")] = ()
    dropout: Annotated[float, doc("of the adapters' input", ge=0, lt=1)] = 0.0
    rslora: Annotated[bool, doc("adapters count alpha / sqrt(rank)")] = False
    dora: Annotated[bool, doc("learn norms apart from directions")] = False
    four_bit: Annotated[bool, doc("pack the base into 4 bits (QLoRA)")] = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Lora:
        """From a recipe's options: `lora_rank`, `lora_alpha`, `lora_targets`, `lora_dropout`, `rslora`, `dora`,
        `four_bit`, as far as they are there."""
        names = {"rslora": "rslora", "dora": "dora", "four_bit": "four_bit"}
        names |= {f"lora_{name}": name for name in ("rank", "alpha", "targets", "dropout")}
        return cls.from_dict({name: options[option] for option, name in names.items() if option in options})

    def lr(self, chosen: float | None, full: float) -> float:
        """The learning rate: the one chosen, or that of full fine-tuning, times `LR_FACTOR` for adapters."""
        return chosen if chosen is not None else full * (LR_FACTOR if self.rank else 1.0)


class GivesLogprobs(Protocol):
    """The model that a policy is held near to. A `Trainer` is one."""

    def logprobs(self, examples: Sequence[Example]) -> list[list[tuple[float, ...]]]:
        """Log-probability of every target, see `Trainer.logprobs`."""
        ...


def tuned_part(policy: Policy, lora: Lora, *, seed: int = 0) -> Policy:
    """Choose what of a policy learns, in place.

    With `rank` 0 everything does; or, where the policy came as an adapter folder, those adapters go on. With a rank,
    new adapters are put on, and those that it came with become part of the base.

    Args:
        policy: as loaded.
        lora: the block of options.
        seed: of the adapters' start.

    Raises:
        ConfigError: an unknown target; 4 bits without adapters.
        MissingExtraError: 4 bits, and `bitsandbytes` is not installed.
    """
    if not lora.rank:
        if lora.four_bit:
            raise ConfigError("a base in 4 bits cannot learn: give the adapters a rank (--lora-rank 32)")
        return policy
    config = models.LoraConfig.from_dict(
        {name: value for name, value in lora.to_dict().items() if name in models.LoraConfig.__struct_fields__}
    )
    base = policy.base
    if models.has_adapters(policy.model):
        models.merge_adapters(policy.model)
        base = None  # nothing on disk holds this base
    if lora.four_bit:
        models.quantise(policy.model)
    models.add_adapters(policy.model, config, seed=seed)
    return replace(policy, base=base, fresh_adapters=True)


def reference_of(policy: Policy, trainer: Trainer) -> GivesLogprobs:
    """The policy as it is before training, for a KL or a preference loss; call it before the first step.

    With adapters that are new it is the trainer's model without them, and costs no memory; else it is a copy.
    """
    if policy.fresh_adapters:
        return _WithoutAdapters(trainer)
    return Trainer(copy.deepcopy(policy.model), trainer.config, trainer.objective, forward=trainer.forward)


def add_parents(bench: Workbench, policy: Policy, given: str) -> list[str]:
    """Register what a policy was loaded from: the model, or the adapters and their base.

    Args:
        bench: whose registry.
        policy: as loaded.
        given: what the user called it.

    Returns:
        Artifact ids, to be the parents of what is made from the policy.
    """
    folders = dict.fromkeys([policy.path, policy.base or policy.path])
    return [
        bench.registry.add_artifact(
            folder, kind="model", name=given if len(folders) == 1 else folder.name, storage="reference"
        ).id
        for folder in folders
    ]


def save_tuned(policy: Policy, folder: Path) -> Path:
    """Write the policy as a plain model folder, adapters merged; and the adapters alone beside it, in `adapter`.

    Returns:
        The model folder.
    """
    policy.save(folder)
    if models.has_adapters(policy.model) and policy.base is not None:
        adapter = models.save_adapters(policy.model, folder.with_name("adapter"), base=policy.base)
        policy.tokenizer.save(adapter)
    return folder


class _WithoutAdapters:
    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def logprobs(self, examples: Sequence[Example]) -> list[list[tuple[float, ...]]]:
        with models.adapters_off(self._trainer.model):
            return self._trainer.logprobs(examples)
