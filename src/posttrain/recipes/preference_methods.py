"""The published methods of preference optimisation by name, each with the settings that its source used.

Names are TRL's where it has the method. A setting is a default: the recipe's options outweigh it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from posttrain import objectives as obj
from posttrain.core import ConfigError, UsageError
from posttrain.objectives import Divergence, Pairs
from posttrain.train import NllNormalise, Objective, PairWeights, preference_objective


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to learn from pairs."""

    loss: Callable[[Method], Callable[[Pairs], Tensor]]  # from the settings to one number for each pair
    beta: float
    lr: float
    source: str  # where loss, beta and lr are from
    reference: bool = True
    label_smoothing: float = 0.0
    gamma: float = 0.0  # SimPO's margin; SLiC's δ
    nll_coef: float = 0.0
    nll_normalise: NllNormalise = "answer"
    nll_over_prompt: bool = False  # the NLL of prompt and answer (ORPO as its authors ran it)
    mask_format: bool = False  # leave tokens that end a turn out of the preference term (Llama 3)
    per_token: bool = False  # rewards are means over tokens
    of_margin: bool = False  # a function of the margin alone: other divergences are defined
    smooths: bool = False  # label smoothing is part of it
    whole_step: bool = False  # sorts the pairs of a step, which must lie in one micro-batch
    pair_weights: PairWeights | None = None

    def objective(self, divergence: Divergence = "reverse_kl") -> Objective:
        """The trainer's objective.

        Raises:
            ConfigError: label smoothing or a divergence that the method has no place for.
        """
        if self.label_smoothing and not self.smooths:
            raise ConfigError("this loss knows no label smoothing: leave it at 0, or take cdpo, robust or exo_pair")
        if divergence != "reverse_kl" and not self.of_margin:
            raise ConfigError(f"divergence {divergence!r} is defined for losses of the margin between the two only")
        plain = self.loss(self)
        return preference_objective(
            plain if divergence == "reverse_kl" else lambda pairs: plain(obj.f_divergence(pairs, divergence)),
            beta=self.beta,
            reference=self.reference,
            per_token_rewards=self.per_token,
            nll_coef=self.nll_coef,
            nll_normalise=self.nll_normalise,
            pair_weights=self.pair_weights,
            whole_step=self.whole_step,
        )


def _smooth(loss: Callable[..., Tensor]) -> Callable[[Method], Callable[[Pairs], Tensor]]:
    return lambda method: partial(loss, beta=method.beta, label_smoothing=method.label_smoothing)


def _plain(loss: Callable[..., Tensor]) -> Callable[[Method], Callable[[Pairs], Tensor]]:
    return lambda method: partial(loss, beta=method.beta)


def _length_normalised(method: Method) -> Callable[[Pairs], Tensor]:
    return lambda pairs: obj.dpo_losses(pairs.per_token(), beta=method.beta, label_smoothing=method.label_smoothing)


def _slic(method: Method) -> Callable[[Pairs], Tensor]:
    return partial(obj.hinge_losses, beta=method.beta, delta=method.gamma)


def _simpo(method: Method) -> Callable[[Pairs], Tensor]:
    return partial(obj.simpo_losses, beta=method.beta, gamma=method.gamma, label_smoothing=method.label_smoothing)


def _orpo(method: Method) -> Callable[[Pairs], Tensor]:
    return lambda pairs: method.beta * obj.orpo_losses(pairs)


def _mpo(method: Method) -> Callable[[Pairs], Tensor]:
    return lambda pairs: (
        0.8 * obj.dpo_losses(pairs, beta=method.beta) + 0.2 * obj.bco_pair_losses(pairs, beta=method.beta)
    )


def _ipo(method: Method) -> Callable[[Pairs], Tensor]:
    return partial(obj.ipo_losses, tau=method.beta)


TRL = "TRL's default"

METHODS: dict[str, Method] = {
    "sigmoid": Method(
        loss=_smooth(obj.dpo_losses),
        beta=0.1,
        lr=1e-6,
        of_margin=True,
        smooths=True,
        source="DPO, arXiv 2305.18290, appendix B (batch 64)",
    ),
    "sigmoid_norm": Method(
        loss=_length_normalised,
        beta=5.0,
        lr=5e-7,
        of_margin=True,
        smooths=True,
        source="Tülu 3 8B, arXiv 2411.15124 (batch 128, warm-up 0.1)",
    ),
    "rpo": Method(
        loss=_smooth(obj.dpo_losses),
        beta=0.1,
        lr=1e-5,
        nll_coef=0.2,
        mask_format=True,
        of_margin=True,
        smooths=True,
        source="Llama 3, arXiv 2407.21783, section 4.1.4; Iterative RPO (2404.19733) has nll_coef 1",
    ),
    "ipo": Method(loss=_ipo, beta=0.1, lr=1e-6, of_margin=True, source=f"IPO, arXiv 2310.12036; beta is τ; {TRL}"),
    "hinge": Method(
        loss=_plain(obj.hinge_losses), beta=0.1, lr=1e-6, of_margin=True, source=f"RSO, arXiv 2309.06657; {TRL}"
    ),
    "slic": Method(
        loss=_slic,
        beta=1.0,
        lr=1e-4,
        gamma=1.0,
        reference=False,
        source="SLiC-HF, arXiv 2305.10425, section 3.2 (batch 512, T5); no reference, gamma is δ",
    ),
    "robust": Method(
        loss=_smooth(obj.robust_losses),
        beta=0.01,
        lr=1e-3,
        label_smoothing=0.1,
        of_margin=True,
        smooths=True,
        source="rDPO, arXiv 2403.00409, appendix B and section 6 (GPT-2 size)",
    ),
    "cdpo": Method(
        loss=_smooth(obj.dpo_losses),
        beta=0.1,
        lr=1e-6,
        label_smoothing=0.1,
        of_margin=True,
        smooths=True,
        source="cDPO, ericmitchell.ai/cdpo.pdf; beta and lr as DPO's",
    ),
    "exo_pair": Method(
        loss=_smooth(obj.exo_losses),
        beta=0.1,
        lr=1e-6,
        label_smoothing=1e-3,
        of_margin=True,
        smooths=True,
        source="EXO, arXiv 2402.00856, appendix B (batch 64)",
    ),
    "nca_pair": Method(
        loss=_plain(obj.nca_losses), beta=0.01, lr=5e-6, source="NCA, arXiv 2402.05369, appendix C (batch 32)"
    ),
    "bco_pair": Method(
        loss=_plain(obj.bco_pair_losses), beta=0.01, lr=5e-7, source="BCO, arXiv 2404.04656, appendix C (batch 128)"
    ),
    "apo_zero": Method(
        loss=_plain(obj.apo_zero_losses), beta=0.1, lr=2e-7, source="APO, arXiv 2408.06266, section 5.2 (batch 64)"
    ),
    "apo_down": Method(
        loss=_plain(obj.apo_down_losses), beta=0.1, lr=2e-7, source="APO, arXiv 2408.06266, section 5.2 (batch 64)"
    ),
    "sppo_hard": Method(
        loss=_plain(obj.sppo_losses), beta=1e-3, lr=5e-7, source="SPPO, arXiv 2405.00675, appendix C (η 1e3, batch 64)"
    ),
    "aot": Method(
        loss=_smooth(obj.aot_losses),
        beta=0.1,
        lr=1e-6,
        whole_step=True,
        smooths=True,
        source=f"AOT, arXiv 2406.05882; {TRL}",
    ),
    "aot_unpaired": Method(
        loss=_smooth(obj.aot_unpaired_losses),
        beta=0.1,
        lr=1e-6,
        whole_step=True,
        smooths=True,
        source=f"AOT, arXiv 2406.05882; {TRL}",
    ),
    "discopop": Method(
        loss=_plain(obj.discopop_losses),
        beta=0.05,
        lr=5e-7,
        of_margin=True,
        source="DiscoPOP, arXiv 2406.08414, appendix B.1 (batch 64, τ 0.05)",
    ),
    "wpo": Method(
        loss=_smooth(obj.dpo_losses),
        beta=0.1,
        lr=1e-6,
        pair_weights="wpo",
        of_margin=True,
        smooths=True,
        source="WPO, arXiv 2406.11827, sampled alignment; beta and lr as DPO's",
    ),
    "simpo": Method(
        loss=_simpo,
        beta=2.0,
        lr=3e-7,
        gamma=1.6,
        reference=False,
        per_token=True,
        smooths=True,
        source="SimPO, arXiv 2405.14734, Mistral base (γ/β 0.8, batch 128)",
    ),
    "cpo": Method(
        loss=_smooth(obj.dpo_losses),
        beta=0.1,
        lr=1e-6,
        reference=False,
        nll_coef=1.0,
        nll_normalise="token",
        smooths=True,
        source=f"CPO, arXiv 2401.08417; the NLL per token, {TRL}",
    ),
    "orpo": Method(
        loss=_orpo,
        beta=0.1,
        lr=8e-6,
        reference=False,
        per_token=True,
        nll_coef=1.0,
        nll_normalise="token",
        nll_over_prompt=True,
        source="ORPO, arXiv 2403.07691, λ 0.1; the NLL over prompt and answer as in its code",
    ),
    "mpo": Method(
        loss=_mpo,
        beta=0.1,
        lr=5e-6,
        nll_coef=1.0,
        source="MPO, arXiv 2411.10442: 0.8 DPO + 0.2 BCO (without shift) + 1.0 NLL (batch 256)",
    ),
}


def method_named(name: str) -> Method:
    """A method by name.

    Raises:
        UsageError: there is none of that name; names those there are.
    """
    if name not in METHODS:
        raise UsageError(f"no preference loss {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]
