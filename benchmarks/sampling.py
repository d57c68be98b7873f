"""Tokens per second of the local engine, and of `transformers` generate on the same weights and prompts.

    python benchmarks/sampling.py --batch 64 192 --rounds 5

The two take turns, round by round, so that whatever else the machine does falls on both; the ratio is the median over
rounds. Nothing here passes or fails: it prints a table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain import models
from posttrain.core import Sampling
from posttrain.engine import LocalEngine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Ids:
    """A tokenizer that has nothing to say: decoding is not what is measured."""

    eos_ids = frozenset({0})

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        raise NotImplementedError

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return ""


def make_prompts(batch: int, vocab_size: int) -> list[list[int]]:
    """Random prompts of 16 to 64 tokens."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(16, 65, (batch,), generator=draw).tolist()
    return [torch.randint(1, vocab_size, (length,), generator=draw).tolist() for length in lengths]


def transformers_runner(folder: Path, dtype: str, prompts: list[list[int]], new: int) -> Callable[[], None]:
    """One call = one batch, sampled at temperature 1."""
    import transformers

    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}

    def run() -> None:
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=mask, **options)
        assert out.shape[1] == longest + new

    return run


def engine_runner(folder: Path, dtype: str, prompts: list[list[int]], new: int, top_p: float) -> Callable[[], None]:
    """One call = one batch, sampled at temperature 1."""
    model = models.load(folder)
    engine = LocalEngine(
        model,
        Ids(model.config.vocab_size),
        max_batch=len(prompts),
        dtype=None if dtype == "fp32" else DTYPES[dtype],
    )
    sampling = Sampling(max_tokens=new, ignore_eos=True, top_p=top_p)

    def run() -> None:
        out = engine.generate(prompts, sampling)
        assert all(len(completion.tokens) == new for completion in out)

    return run


def peak_flops(dtype: str) -> float:
    """Multiplications and additions per second of a large matrix product: what the machine can do at best."""
    left, right = (torch.randn(2048, 2048).to(DTYPES[dtype]) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds)


def measure(runners: dict[str, Callable[[], None]], num_tokens: int, rounds: int) -> dict[str, list[float]]:
    """Tokens per second, round by round, the runners taking turns."""
    for run in runners.values():
        run()
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            start = time.perf_counter()
            run()
            rates[name].append(num_tokens / (time.perf_counter() - start))
    return rates


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 192])
    parser.add_argument("--new", type=int, default=64, help="tokens per completion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--top-p", type=float, default=1.0, help="of the engine's rows; transformers samples plainly")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--without-transformers", action="store_true")
    args = parser.parse_args()
    config = models.DecoderConfig(
        vocab_size=args.vocab,
        width=args.width,
        num_layers=args.layers,
        num_heads=args.width // 32,
        num_kv_heads=args.width // 64,
        head_dim=32,
        mlp_width=args.width * 11 // 4,
        max_positions=1024,
        tie_embeddings=True,
    )
    model = models.Decoder.random(config, 0)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, {args.vocab} ids, {args.new} new tokens, {torch.get_num_threads()} threads")
    print(f"medians of {args.rounds} rounds, tokens per second; of peak: 2 × parameters × rate over a large product's")
    print(f"{'batch':>5} {'dtype':>5} {'engine':>10} {'of peak':>8} {'transformers':>13} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.save(model, folder)
        for batch in args.batch:
            prompts = make_prompts(batch, args.vocab)
            for dtype in args.dtype:
                runners = {"engine": engine_runner(folder, dtype, prompts, args.new, args.top_p)}
                if not args.without_transformers:
                    runners["transformers"] = transformers_runner(folder, dtype, prompts, args.new)
                rates = measure(runners, batch * args.new, args.rounds)
                ours, theirs = rates["engine"], rates.get("transformers", [])
                used = 2 * size * statistics.median(ours) / peak_flops(dtype)
                line = f"{batch:>5} {dtype:>5} {statistics.median(ours):>10,.0f} {used:>8.1%}"
                if theirs:
                    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
                    line += f" {statistics.median(theirs):>13,.0f} {ratio:>6.2f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
