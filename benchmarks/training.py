"""Tokens per second of the trainer, and their share of what the machine's matrix products reach.

    python benchmarks/training.py --size 3m 25m --dtype bfloat16 --rounds 7
    POSTTRAIN_NATIVE=0 python benchmarks/training.py        # the same on PyTorch's kernels alone

One step is 64 documents, whose lengths are drawn once, in micro-batches of `--micro-tokens`: forward, backward, clip,
AdamW. Peak is the rate of a product of two large bf16 (float32) matrices on the same threads, measured between the
rounds. Operations are counted as 6 per weight of every matrix product and token, and those of causal attention; tokens
that fill rows up, and what is computed twice, are not counted. Nothing here passes or fails: it prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from posttrain import models, train
from posttrain.core import Example, TokenSequence

SHAPES = {"3m": (256, 4, 8, 4, 32), "25m": (512, 8, 8, 4, 64), "110m": (768, 16, 12, 4, 64)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_config(size: str, vocab: int) -> models.DecoderConfig:
    """A decoder of Qwen2's kind."""
    width, layers, heads, kv_heads, head_dim = SHAPES[size]
    return models.DecoderConfig(
        family="qwen2",
        vocab_size=vocab,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=width * 11 // 4,
        max_positions=8192,
        qkv_bias=True,
        tie_embeddings=True,
    )


def make_documents(num: int, mean_length: int, vocab: int) -> list[Example]:
    """Random documents of half to one and a half times the mean length; every token but the first is a target."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(mean_length // 2, mean_length * 3 // 2 + 1, (num,), generator=draw).tolist()
    return [
        Example(
            id=f"document-{index}",
            sequences=(
                TokenSequence(
                    tokens=tuple(torch.randint(0, vocab, (length,), generator=draw).tolist()),
                    mask=(False,) + (True,) * (length - 1),
                ),
            ),
        )
        for index, length in enumerate(lengths)
    ]


def step_flops(config: models.DecoderConfig, documents: list[Example]) -> float:
    """Operations of a forward and a backward pass over the documents."""
    lengths = [len(document.sequences[0].tokens) for document in documents]
    return sum(3.0 * length * models.flops_per_token(config, (length + 1) // 2) for length in lengths)


def peak_flops(dtype: str) -> float:
    """Operations per second of a large product: what the machine reaches at best."""
    left, right = (torch.randn(2048, 2048).to(DTYPES[dtype]) for _ in range(2))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def measure(size: str, vocab: int, dtype: str, args: argparse.Namespace) -> str:
    """One line of the table."""
    config = make_config(size, vocab)
    model = models.Decoder.random(config, 0)
    num = sum(parameter.numel() for parameter in model.parameters())
    if args.lora:
        models.add_adapters(model, models.LoraConfig(rank=args.lora))
    settings = train.TrainConfig(lr=1e-4, dtype=dtype, micro_tokens=args.micro_tokens)
    trainer = train.Trainer(model, settings, train.nll_objective)
    documents = make_documents(args.documents, args.length, vocab)
    tokens = sum(len(document.sequences[0].tokens) for document in documents)
    flops = step_flops(config, documents)
    for _ in range(2):
        trainer.step(documents)
    seconds, peaks = [], []
    for _ in range(args.rounds):
        start = time.perf_counter()
        trainer.step(documents)
        seconds.append(time.perf_counter() - start)
        peaks.append(peak_flops(dtype))
    best, typical, peak = min(seconds), statistics.median(seconds), max(peaks)
    return (
        f"{size:>5} {num / 1e6:>6.1f} M {vocab:>7} {dtype:>9} {tokens / typical:>11,.0f} {tokens / best:>9,.0f} "
        f"{flops / typical / 1e9:>8.0f} {peak / 1e9:>7.0f} {flops / typical / peak:>8.1%}"
    )


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=list(SHAPES), default=["3m", "25m"])
    parser.add_argument("--vocab", type=int, nargs="+", default=[1024, 32768])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16"])
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--length", type=int, default=36, help="mean tokens per document")
    parser.add_argument("--micro-tokens", type=int, default=8192)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all weights learn")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {args.documents} documents of about {args.length} tokens")
    print(
        f"{'size':>5} {'weights':>8} {'vocab':>7} {'dtype':>9} {'tokens/s':>11} {'best':>9} {'GFLOP/s':>8} {'peak':>7} "
        f"{'of peak':>8}"
    )
    for size in args.size:
        for vocab in args.vocab:
            for dtype in args.dtype:
                print(measure(size, vocab, dtype, args), flush=True)


if __name__ == "__main__":
    main()
