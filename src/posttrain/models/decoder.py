"""The decoder: GPT-2 → Llama → Qwen3 → OLMo 2, one lineage told apart by configuration.

Used by the trainer and by the embedded sampler, from the same weights. Attention goes through `Attend`, so a sampler
puts its cache there and a trainer its packing; everything else is the same arithmetic.

Precision: weights may be fp32 or bf16. The residual stream, the norms and the logits are fp32 either way; only matrix
products, rotary positions and attention run in bf16. `torch.autocast` over fp32 weights does the same.

Shapes: B batch, T tokens, D width, H query heads, J key-value heads, K numbers per head, V vocabulary, N any number
of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from posttrain.core import ModelError, derive_seed
from posttrain.models import fused, products
from posttrain.models.attend import Attend, CausalAttend, packed_positions
from posttrain.models.config import DecoderConfig
from posttrain.models.norm import LayerNorm, RmsNorm
from posttrain.models.rope import Rope, Rotation, rotate
from posttrain.models.token_stats import project

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def make_norm(config: DecoderConfig, width: int | None = None) -> nn.Module:
    """The family's norm over the residual stream, or over `width` numbers."""
    kind = RmsNorm if config.norm == "rms" else LayerNorm
    return kind(width or config.width, config.norm_eps)


class Run(NamedTuple):
    """What is the same for all layers of one forward pass."""

    rotation: Rotation | None
    angles: tuple[Tensor, Tensor] | None  # the rotation's cosines and sines of every token, NK, for the fused pieces
    attend: Attend
    dtype: torch.dtype  # of the weights
    fused: torch.dtype | None  # of the products, where the fused pieces do what stands between them

    def linear(self, module: nn.Module, x_BTD: Tensor) -> Tensor:
        """A projection of the layer: with the fused pieces, fp32 products too are by the faster kernel."""
        out_BTF: Tensor = products.linear(module, x_BTD) if self.fused is not None else module(x_BTD)
        return out_BTF


class Attention(nn.Module):
    """Self-attention. The rows of `qkv` are the query heads, then the key heads, then the value heads."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.windows[layer]
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv = nn.Linear(config.width, heads + 2 * kv_heads, bias=config.qkv_bias)
        self.out = nn.Linear(heads, config.width, bias=config.out_bias)
        if config.qk_norm != "none":
            per_head = config.qk_norm == "head"
            self.q_norm = RmsNorm(config.head_dim if per_head else heads, config.norm_eps)
            self.k_norm = RmsNorm(config.head_dim if per_head else kv_heads, config.norm_eps)

    def forward(self, x_BTD: Tensor, run: Run) -> Tensor:
        """What the heads read from the tokens they see, BTD."""
        H, J = self.num_heads, self.num_kv_heads
        heads_BTAK = run.linear(self.qkv, x_BTD).view(
            *x_BTD.shape[:2], H + 2 * J, self.head_dim
        )  # A = H + 2J: all heads
        if run.fused is not None:
            out_BTHK = self._attend_fused(heads_BTAK, run)
            if out_BTHK is not None:
                return run.linear(self.out, out_BTHK.flatten(-2))
        qk_BTAK = heads_BTAK[:, :, : H + J]
        if self.qk_norm != "none":
            qk_BTAK = self._normalise(qk_BTAK)
        if run.rotation is not None:
            qk_BTAK = rotate(qk_BTAK, run.rotation)
        out_BTHK = run.attend(
            self.layer, qk_BTAK[:, :, :H], qk_BTAK[:, :, H:], heads_BTAK[:, :, H + J :], window=self.window
        )
        out_BTD: Tensor = self.out(out_BTHK.flatten(-2))
        return out_BTD

    def _attend_fused(self, heads_BTAK: Tensor, run: Run) -> Tensor | None:
        """The heads' output BTHK by the fused pieces, or None where they do not do it."""
        H, J = self.num_heads, self.num_kv_heads
        if not isinstance(run.attend, CausalAttend) or not run.attend.fits(heads_BTAK, J):
            return None
        if self.qk_norm != "none":
            weights = (self.q_norm.weight, self.k_norm.weight)
            heads_BTAK = fused.norm_heads(heads_BTAK, *weights, self.q_norm.eps, H, J)
        return run.attend.attend_fused(heads_BTAK, run.angles, H, self.window)

    def _normalise(self, qk_BTAK: Tensor) -> Tensor:
        q_BTHK, k_BTJK = qk_BTAK[:, :, : self.num_heads], qk_BTAK[:, :, self.num_heads :]
        if self.qk_norm == "head":
            normed = torch.cat((self.q_norm(q_BTHK), self.k_norm(k_BTJK)), 2)
        else:
            normed = torch.cat((self.q_norm(q_BTHK.flatten(-2)), self.k_norm(k_BTJK.flatten(-2))), -1)
            normed = normed.view(qk_BTAK.shape)
        return normed.to(qk_BTAK.dtype)


class Mlp(nn.Module):
    """The two-layer perceptron. With a gate, the rows of `up` are those of the gate, then those of the values."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gated = config.gated_mlp
        self.fusable = config.gated_mlp and config.activation == "silu"
        self.activation = _ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.width, config.mlp_width * (2 if config.gated_mlp else 1), bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor, run: Run) -> Tensor:
        """BTD."""
        inner = run.linear(self.up, x_BTD)
        if self.fusable and run.fused is not None:
            inner = fused.silu_gate(inner)
        elif self.gated:
            gate, values = inner.chunk(2, -1)
            inner = self.activation(gate) * values
        else:
            inner = self.activation(inner)
        return run.linear(self.down, inner)


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.post_norm = config.norm_placement == "post"
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = Mlp(config)

    def forward(self, x_BTD: Tensor, run: Run) -> Tensor:
        """The residual stream after this layer, fp32."""
        if run.fused is not None and not self.post_norm:
            x_BTD, normed_BTD = fused_norm(self.attention_norm, x_BTD, run.fused)
            x_BTD = fused.add(x_BTD, self.attention(normed_BTD, run))
            x_BTD, normed_BTD = fused_norm(self.mlp_norm, x_BTD, run.fused)
            return fused.add(x_BTD, self.mlp(normed_BTD, run))
        if self.post_norm:
            x_BTD = x_BTD + self.attention_norm(self.attention(x_BTD.to(run.dtype), run))
            return x_BTD + self.mlp_norm(self.mlp(x_BTD.to(run.dtype), run))  # type: ignore[no-any-return]
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD).to(run.dtype), run)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD).to(run.dtype), run)  # type: ignore[no-any-return]


def fused_norm(norm: nn.Module, x_BTD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The residual stream, and what products read of it."""
    if isinstance(norm, RmsNorm):
        return fused.norm(x_BTD, norm.weight, norm.eps, dtype)
    return x_BTD, norm(x_BTD).to(dtype)


class Decoder(nn.Module):
    """Tokens → logits of the next token.

    Fresh from the constructor the weights are whatever PyTorch put there; `Decoder.random` and `models.load` give
    weights that mean something. A tied output head is no parameter of its own: it is `embed.weight`.

    Attributes:
        recompute_layers: while training, keep only each layer's input and compute the rest again in backward.
        exact_logits: multiply the output head in fp32, on a CPU too, where bf16 products are rounded to bf16 and
            logprobs with them (by up to 2^-8 of a logit). False is 4-5 × faster for the head alone. `token_stats` under
            autocast has fp32 sums of bf16 products on either kind of device, where its C is compiled.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_layers = False
        self.exact_logits = True
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_positions, config.width) if config.positions == "learned" else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self.rope = Rope(config) if config.positions == "rope" else None

    @classmethod
    def random(
        cls,
        config: DecoderConfig,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Decoder:
        """Fresh weights as the family draws them, the same for the same seed on every machine.

        Matrices are normal with `init_std`, biases 0, norms 1; GPT-2 divides the projections that write to the
        residual stream by the root of their number (GPT-2 paper, section 2.3). Each parameter draws from a seed of its
        own name, so the order of parameters does not matter.
        """
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        for name, parameter in model.named_parameters():
            _draw(name, parameter.data, config, seed)
        return model.cast(dtype).to(device)

    def cast(self, dtype: torch.dtype) -> Decoder:
        """Turn the weights into `dtype`, in place; the norms' few numbers stay fp32."""
        norms = {
            id(p) for module in self.modules() if isinstance(module, RmsNorm | LayerNorm) for p in module.parameters()
        }
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.float32 if id(parameter) in norms else dtype)
        return self

    def forward(
        self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Logits of every token's successor, BTV, fp32.

        Args:
            tokens_BT: token ids. Rows may be padded on the right with any valid id.
            positions_BT: each token's position in its sequence; None counts from 0.
            lengths: the one row is several sequences packed one after another, of these lengths.
        """
        if lengths is not None and positions_BT is None:
            positions_BT = packed_positions(lengths, tokens_BT.device)
        attend = CausalAttend(lengths)
        return self.logits(self.hidden(tokens_BT, positions_BT=positions_BT, attend=attend))

    def hidden(self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """What the output head reads: the residual stream after the last norm, BTD, fp32.

        Args:
            tokens_BT: token ids.
            positions_BT: each token's position in its sequence; None counts from 0.
            attend: who sees whom; None is causal over each row.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        if attend is None:
            attend = CausalAttend()
        x_BTD = self.embed(tokens_BT).float()
        if self.positions is not None:
            if positions_BT.device.type == "cpu" and int(positions_BT.max()) >= self.config.max_positions:
                raise ModelError(
                    f"position {int(positions_BT.max())} is beyond the {self.config.max_positions} that this model "
                    "learned; shorten the sequences"
                )
            x_BTD = x_BTD + self.positions(positions_BT)
        run = self._run(tokens_BT, positions_BT, attend)
        recompute = self.recompute_layers and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                x_BTD = checkpoint(layer, x_BTD, run, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, run)
        if run.fused is not None:
            return fused_norm(self.final_norm, x_BTD, torch.float32)[1]
        hidden_BTD: Tensor = self.final_norm(x_BTD)
        return hidden_BTD

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Scores of every vocabulary entry, fp32, for hidden states of any leading shape."""
        return project(hidden_ND, self.head_weight(), exact=self.exact_logits)

    def head_weight(self) -> Tensor:
        """The output head, VD: the embedding table where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def _run(self, tokens_BT: Tensor, positions_BT: Tensor, attend: Attend) -> Run:
        """What all layers share. With the fused pieces, rotary positions stay fp32."""
        dtype = self._product_dtype()
        pieces = isinstance(attend, CausalAttend) and fused.available(tokens_BT.device, dtype)
        rotation, angles = None, None
        if self.rope is not None:
            rotation = self.rope.rotation(positions_BT, torch.float32 if pieces else dtype)
            if pieces:
                shape = (*tokens_BT.shape, self.config.head_dim)
                cos, sin = (x_BT1K[:, :, 0].expand(shape).reshape(-1, shape[-1]) for x_BT1K in rotation)
                angles = (cos, sin)
        return Run(rotation, angles, attend, self.embed.weight.dtype, dtype if pieces else None)

    def _product_dtype(self) -> torch.dtype:
        """The type in which queries and keys leave their projection."""
        device = self.embed.weight.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.embed.weight.dtype


def _draw(name: str, data: Tensor, config: DecoderConfig, seed: int) -> None:
    """Fill one parameter with its random start."""
    if name.endswith("bias"):
        data.zero_()
    elif "norm" in name:
        data.fill_(1.0)
    else:
        writes_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
        scaled = config.family == "gpt2" and writes_residual
        std = config.init_std / (2 * config.num_layers) ** 0.5 if scaled else config.init_std
        data.normal_(0.0, std, generator=torch.Generator().manual_seed(derive_seed(seed, "decoder", name)))


def num_parameters(config: DecoderConfig) -> int:
    """How many numbers a decoder of this shape holds; a tied head counts once."""
    with torch.device("meta"):
        model: Any = Decoder(config)
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: DecoderConfig, context: int) -> int:
    """Floating-point operations of one token's forward pass; training takes 3 × as many.

    Two per weight of every matrix product (the output head too, the embedding's look-up not) and, per layer, four per
    number of all query heads for each token seen, up to its window.

    Args:
        context: tokens that each token sees, itself included; half the length on average for causal sequences.
    """
    attention = config.width * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    attention += config.num_heads * config.head_dim * config.width
    mlp = config.width * config.mlp_width * (3 if config.gated_mlp else 2)
    matrices = config.num_layers * (attention + mlp) + config.vocab_size * config.width
    seen = sum(context if window is None else min(context, window) for window in config.windows)
    return 2 * matrices + 4 * config.num_heads * config.head_dim * seen
